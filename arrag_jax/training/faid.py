"""FAiD's fine-tuning: adapters are trained on images with precomputed neighbours, while the base model is frozen.

With ``blend`` off, the same LoRA and head are trained without retrieval. This control shows what blending adds.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt8

from arrag_jax import progress
from arrag_jax.config import DaidConfig, DataConfig, RetrievalConfig, SamplingConfig, TrainConfig
from arrag_jax.decode.policies import Daid, Faid, Plain
from arrag_jax.errors import UserError
from arrag_jax.fields import DataPath, ModelPath, Settings
from arrag_jax.figures import grids
from arrag_jax.files import sha256_of
from arrag_jax.interfaces import DecodePolicy, TunableModel
from arrag_jax.models.checkpoint import (
    config_of,
    load_model,
    load_prompts,
    load_tokenizer,
    save_model,
    shape_of,
    shapes_of,
)
from arrag_jax.models.family import SavedEncoder
from arrag_jax.models.folder import require_no_int8
from arrag_jax.models.place import checkpoint_folder
from arrag_jax.models.tensor_files import stored_tensors
from arrag_jax.nn.faid import FaidConfig
from arrag_jax.nn.lora import LoraConfig
from arrag_jax.nn.variables import Adapter, freeze, retype
from arrag_jax.ops.keys import HIDDEN
from arrag_jax.retrieval.load import load_retriever
from arrag_jax.store.neighbor_set import NeighborSet, set_in
from arrag_jax.training.shared import (
    BITS,
    draw,
    in_batches,
    mean_bits,
    mesh_of_export,
    rows_of_a_device,
    search_over,
    split_over,
    write_manifest,
)
from arrag_jax.training.state import initial_model
from arrag_jax.training.task import Batch, SampleImages, Scalars

PICTURES = 8  # number of prompts for the sample images


@dataclasses.dataclass(frozen=True)
class FaidOptions(Settings):
    """Settings of the fine-tuning.

    Attributes:
      base: checkpoint folder of the model whose weights are frozen.
      neighbors: folder that ``build_neighbors`` has written, or its id on the hub, with its sets "train" and "valid".
        If they hold more neighbours per position than the blenders take, training uses a new random choice of them in
        every epoch; held-out metrics and sample images use the nearest ones.
      retrieval: search settings of the sample images.
      blend: False trains LoRA and head alone, without retrieval.
      faid: where the blenders are. K must not exceed the K of the neighbour sets; if both are equal, training uses only
        the nearest neighbours.
      start_silent: True initialises the blenders so that they add nothing at first; the official initialisation
        disturbs the model at first.
      caption_dropout: share of prompts that are replaced by the unconditional one, for guidance; blenders add nothing
        there.
      prompt_length: tokens per prompt; a longer caption is an error.
      daid, sampling: settings of the sample images.
    """

    base: ModelPath
    neighbors: DataPath
    retrieval: RetrievalConfig
    blend: bool = True
    faid: FaidConfig = FaidConfig()
    lora: LoraConfig = LoraConfig()
    start_silent: bool = False
    caption_dropout: float = 0.1
    prompt_length: int = 64
    daid: DaidConfig = DaidConfig()
    sampling: SamplingConfig = SamplingConfig()

    def __post_init__(self):
        if not 0 <= self.caption_dropout < 1:
            raise UserError(f"caption_dropout={self.caption_dropout} is outside [0, 1)")
        if self.prompt_length < 1:
            raise UserError(f"prompt_length={self.prompt_length} must be at least 1")


def mark_adapters(model: TunableModel, blenders: bool = True) -> None:
    """Turns LoRA, head and (if ``blenders`` is true) blenders into ``Adapter``, all else into ``Frozen``, in place."""
    require_no_int8(model, "trained")
    for part in model.adapters(blenders):
        retype(part, Adapter)
    freeze(model)


class FaidStep:
    """The step of next-code prediction that trains LoRA (q, v), blenders with their norms, and the head.

    Everything else is frozen.
    """

    trainable = Adapter
    best_metric = ("bits_per_code", "min")

    def __init__(self, config: TrainConfig, options: FaidOptions):
        if config.data != DataConfig(eval_examples=config.data.eval_examples):
            raise UserError(
                "task faid reads only eval_examples of config.data; its images come from config.options.neighbors"
            )
        self.config, self.options = config, options

    def load(self, mesh: Mesh | None) -> Any:
        """Returns the base as its graph and its arrays."""
        raise NotImplementedError

    def shapes(self) -> Any:
        """Returns the same as ``load``, shapes instead of arrays; reads no weights."""
        return nnx.split(shapes_of(self.options.base, self.config.compute_dtype))

    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of one training example."""
        positions, options = math.prod(shape_of(self.options.base)[1].grid), self.options
        return {
            "prompt_ids": jax.ShapeDtypeStruct((options.prompt_length,), jnp.int32),
            "prompt_mask": jax.ShapeDtypeStruct((options.prompt_length,), bool),
            "codes": jax.ShapeDtypeStruct((positions,), jnp.int32),
            "neighbors": jax.ShapeDtypeStruct((positions, options.faid.neighbors), jnp.int32),
        }

    def init_model(self, rngs: nnx.Rngs, loaded: Any = None) -> TunableModel:
        """Returns the base with fresh blenders and LoRA; all base weights but the head are frozen."""
        options, model = self.options, nnx.merge(*(self.load(None) if loaded is None else loaded), copy=True)
        try:
            model.add_adapters(options.lora, options.faid if options.blend else None, rngs, options.start_silent)
        except UserError as error:
            raise UserError(f"config.options.base={options.base}: {error}") from error
        mark_adapters(model, options.blend)
        model.language_model.remat = self.config.remat
        return model

    def loss(self, model: TunableModel, batch: Batch, key: Array) -> tuple[Float[Array, ""], Scalars]:
        """Returns the mean cross-entropy of the codes, in nats; some prompts are dropped for guidance."""
        caption_key, dropout_key = jax.random.split(key)
        ids, mask = batch["prompt_ids"], batch["prompt_mask"]
        kept = ~jax.random.bernoulli(caption_key, self.options.caption_dropout, (len(ids),))
        ids = jnp.where(kept[:, None], ids, model.unconditional((ids, mask))[0])
        loss, gates = self._cross_entropy(model, {**batch, "prompt_ids": ids}, kept, nnx.Rngs(dropout_key))
        metrics = {"bits_per_code": loss * BITS}
        return loss, metrics | {f"gate_{i}": gate for i, gate in enumerate(gates)}

    def _cross_entropy(
        self, model: TunableModel, batch: Batch, kept: Bool[Array, " B"] | None = None, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, ""], Float[Array, " blenders"]]:
        neighbors = batch["neighbors"] if self.options.blend else None
        condition = batch["prompt_ids"], batch["prompt_mask"]
        logits, gates = model.forward(condition, batch["codes"], neighbors, kept, rngs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["codes"]).mean(), gates

    def after_update(self, model: TunableModel, key: Array) -> None:
        """Does nothing."""

    def eval_metrics(self, model: TunableModel, batch: Batch) -> Scalars:
        """Returns the held-out bits per code, given the prompts."""
        return {"bits_per_code": self._cross_entropy(model, batch)[0] * BITS}


class FaidTask(FaidStep):
    """The step with its base, its neighbour sets and the search of its sample images."""

    def __init__(self, config: TrainConfig, options: FaidOptions):
        super().__init__(config, options)
        self.tokens = math.prod(config_of(options.base).grid)
        text = load_prompts(options.base)
        if not isinstance(text, SavedEncoder):
            raise UserError(f"config.options.base={options.base} holds a kind of model that cannot be tuned here")
        self.text, self.vocabulary = text, text.vocabulary
        self.sets = {name: NeighborSet.open(set_in(options.neighbors, name)) for name in ("train", "valid")}
        for neighbors in self.sets.values():
            neighbors.verify()  # training reads them in random order, in which no hash can be checked
        self.daid = Daid.of(options.daid)
        for neighbors in self.sets.values():
            if (neighbors.settings.keys == HIDDEN.name) != (options.retrieval.keys == HIDDEN.name):
                raise UserError(
                    f"the neighbours in {neighbors.directory} were found by {neighbors.settings.keys} keys, but sample "
                    f"grids search by {options.retrieval.keys} keys; give "
                    f"--config.options.retrieval.keys={neighbors.settings.keys}"
                )
        if options.blend:
            for neighbors in self.sets.values():
                if neighbors.k < options.faid.neighbors:
                    raise UserError(
                        f"config.options.faid.neighbors={options.faid.neighbors}, but {neighbors.directory} holds "
                        f"{neighbors.k} neighbours per position; build a set with a larger k in another --workdir: "
                        f"--config.retrieval.k={options.faid.neighbors}"
                    )
            if options.retrieval.k < options.faid.neighbors:
                raise UserError(
                    f"config.options.retrieval.k={options.retrieval.k} gives sample grids fewer neighbours than "
                    f"config.options.faid.neighbors={options.faid.neighbors}; raise k: "
                    f"--config.options.retrieval.k={options.faid.neighbors}"
                )

    def load(self, mesh: Mesh | None) -> Any:
        """Returns the base as its graph and its arrays."""
        options = self.options
        tokenizer = load_tokenizer(options.base).fingerprint
        for neighbors in self.sets.values():
            neighbors.require_tokenizer(tokenizer)
        model = load_model(options.base, self.config.compute_dtype, mesh=mesh)
        if not isinstance(model, TunableModel):
            raise UserError(f"config.options.base={options.base} holds a kind of model that cannot be tuned here")
        return nnx.split(model)

    def base(self) -> dict[str, str]:
        """Returns the hashes of the base's weights, its text tokenizer and both neighbour sets."""
        folder = Path(self.options.base)
        files = {tensor.file for tensor in stored_tensors(folder).values()}
        files |= {checkpoint_folder(folder) / "tokenizer.json"}
        hashes = {f"base/{path.name}": sha256_of(path) for path in sorted(files)}
        return hashes | {f"neighbors/{name}": found.store_fingerprint for name, found in self.sets.items()}

    def _prompt(self, caption: str) -> tuple[Int[np.ndarray, " L"], Bool[np.ndarray, " L"]]:
        try:
            (ids,), (mask,) = self.text([caption], self.options.prompt_length)
        except UserError as error:
            raise UserError(
                f"a caption of {self.options.neighbors} cannot be a prompt: {error}; build the sets without it, or "
                "change config.options.prompt_length"
            ) from error
        return ids, mask

    def _example(self, example: dict[str, Any], order: np.ndarray | None = None) -> dict[str, np.ndarray]:
        ids, mask = self._prompt(example["caption"])
        neighbors = example["neighbors"] if order is None else example["neighbors"][:, order]
        neighbors = neighbors[:, : self.options.faid.neighbors]
        return {"prompt_ids": ids, "prompt_mask": mask, "codes": example["codes"], "neighbors": neighbors}

    def train_source(self) -> grain.MapDataset:
        """Returns codes with prompts and neighbours; each epoch takes another random choice of K stored neighbours.

        Raises:
          UserError: if a caption cannot be a prompt.
        """
        stored = self.sets["train"]
        leads = jax.process_index() == 0
        for i in progress.bar(range(len(stored)), leads, desc="reading captions", unit="image"):
            self._prompt(stored[i]["caption"])
        source = grain.MapDataset.source(stored).seed(self.config.seed)
        return source.random_map(lambda example, rng: self._example(example, rng.permutation(stored.k)))

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """Yields batches of the first ``data.eval_examples`` of the validation set, with the nearest neighbours."""
        stored = self.sets["valid"]
        count = min(len(stored), self.config.data.eval_examples)
        return in_batches(stored, count, batch_size, self._example)

    def sample_callback(self, mesh: Mesh) -> Callable[[TunableModel], SampleImages]:
        """Returns a function that generates images from the same prompts and seeds at each call.

        Its columns are the base alone, the base with DAiD, and the tuned model before and now. "Before" has fresh
        blenders and LoRA, also in a run that started from ``init_from``.

        Raises:
          UserError: if the store or index is missing, or belongs to another tokenizer.
        """
        policy, name = (Faid(), "FAiD") if self.options.blend else (Plain(), "LoRA")
        search, settings = search_over(self.options.retrieval, mesh), self.sets["train"].settings
        retriever = load_retriever(
            search, settings.fingerprint, split_over(mesh), "fsdp", "data", backbone=settings.backbone
        )[1]
        base = nnx.merge(*self.load(split_over(mesh))) if settings.backbone and self.options.blend else None
        unchanging: list[UInt8[np.ndarray, "N h w 3"]] = []
        stored = self.sets["valid"]
        captions = [stored[i]["caption"] for i in range(min(PICTURES, len(stored)))]
        ids, mask = self.text(captions, self.options.prompt_length)

        def drawn(model: TunableModel, policy: DecodePolicy) -> UInt8[np.ndarray, "N h w 3"]:
            settings = dataclasses.asdict(self.options.sampling)
            return draw(model, mesh, ids, mask, self.config.seed, policy, retriever, base, **settings)

        def draw_samples(model: TunableModel) -> SampleImages:
            if not unchanging:
                # Fresh LoRA adds nothing, so without blending this model equals the base.
                start = initial_model(self, self.config, mesh)
                unchanging.extend(drawn(start, way) for way in (Plain(), self.daid, policy))
            columns = [*unchanging, drawn(model, policy)]
            titles = ["plain", "DAiD", f"{name} before", f"{name} now"]
            rows = [(caption, [column[i] for column in columns]) for i, caption in enumerate(captions)]
            return {"samples": grids.labelled_grid(rows, titles)}

        return draw_samples

    def export(self, model: TunableModel, directory: Path, run: dict[str, Any]) -> None:
        """Writes the tuned model in the published layout, with merged LoRA, in bfloat16, and its held-out metric."""
        model.merge_lora()
        save_model(model, directory, "bfloat16")
        self.text.save(directory)
        tuned = load_model(directory, mesh=mesh_of_export(self.config))
        mean = mean_bits(self, tuned, self.eval_batches(rows_of_a_device(self.config)))
        write_manifest(directory, tuned, run, valid_bits_per_code=mean)
