# size: all Protocols stand in one file, so that a reader finds them together
"""Defines the shape letters and the Protocols that the whole package uses. Read this file first.

A tokenizer turns an image into a grid of codes and back. A backbone draws such a grid one code after another, in raster
order. Before each step a retriever finds the stored patches whose context is nearest to the context drawn so far. A
decode policy decides how these neighbours change the next code's distribution.

Every annotation uses these letters:

  B  batch size                            K  neighbours per position
  H, W  height and width of the code grid  N  stored patches
  T  positions of the grid, T = H·W        U  unique contexts among the stored patches
  L  prompt length in tokens               S  shards
  V  number of codes in the codebook       D  width of the model
  C  dimension of one code's vector        R  rows of a guided batch: 2B with guidance, else B
  E  dimension of a key; 4C for the paper's

A *position* is one place of the code grid. The *context* of a position is the L-shape of four positions that are drawn
before it: up-left, up, up-right and left. Codes are int32. The value -1 marks a code, a neighbour or a context position
that is absent.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from arrag_jax.ops.neighbors import Neighbors

Cache = Any  # a pytree of the backbone; the decode loop passes it on and never reads it
Condition = Any  # the input that guides a draw, such as prompt tokens: a pytree of arrays with the batch as first axis
ArrayLike = Any  # input from the caller, checked at run time: lists, or an array of numpy, JAX or another library


@runtime_checkable
class Retriever(Protocol):
    """A search for the stored patches whose contexts are nearest to the context drawn so far.

    A retriever is a pytree. Its arrays are leaves, so they pass through ``jit`` as arguments and never as constants.
    """

    @property
    def k(self) -> int: ...  # number of neighbours returned per query

    def search(self, context: Int[Array, "B 4"]) -> Neighbors:
        """Returns the ``k`` nearest neighbours of each context, nearest first.

        A context is given as four code ids; the retriever holds the codebook that turns them into a key. Ids are
        passed because the cost of a host callback grows with the bytes it transfers.

        A row that contains -1 has no complete context; all its neighbours are empty.
        """
        ...


@runtime_checkable
class StateRetriever(Protocol):
    """A search whose query is the backbone's state at the position to draw; it runs after the step. A pytree, too."""

    @property
    def k(self) -> int: ...  # number of neighbours returned per query

    def search_states(
        self, state: Float[Array, "B D"], drawn: Int[Array, "B T"], position: Int[Array, " B"]
    ) -> Neighbors:
        """Returns the ``k`` nearest neighbours of each state, nearest first; fewer may be found.

        Args:
          drawn: the picture so far; only codes before ``position`` are read.
          position: number of the cell that each state predicts.
        """
        ...


@runtime_checkable
class AroundRetriever(Protocol):
    """A search by all known codes around a position, also those after it; for pictures of which parts are known."""

    @property
    def k(self) -> int: ...  # number of neighbours returned per query

    def search_around(self, codes: Int[Array, "B 8"]) -> Neighbors:
        """Returns the ``k`` nearest neighbours by the known codes alone, nearest first.

        Args:
          codes: the context, then right, down-left, down and down-right; -1 where a code is not known.
        """
        ...


AnyRetriever = Retriever | StateRetriever | AroundRetriever


@runtime_checkable
class StoredImages(Protocol):
    """The code grids of stored images, as drawing uses them beside a search. A pytree, too."""

    def guesses(
        self, codes: Int[Array, "B T"], final: Int[Array, " B"], known: Int[Array, " B"], end: Int[Array, " B"]
    ) -> Int[Array, "B T"]:
        """Returns the codes with a guess for every position from ``final`` to ``end``.

        A guess changes the number of passes over windows (``decode.parallel``), never the picture.

        Args:
          codes: final codes before ``final``, then the draws of the last pass before ``known``; the rest is not read.
        """
        ...

    def forbidden(
        self, drawn: Int[Array, "n T"], position: Int[Array, " n"], most: int, known: Int[Array, "n T"] | None = None
    ) -> Bool[Array, "n V"]:
        """Returns which codes would make a copied run of more than ``most`` different codes at the positions.

        Args:
          drawn: the pictures so far; only codes before ``position`` are read.
          known: codes that belong to the pictures from the start, -1 elsewhere.
        """
        ...


@runtime_checkable
class ImageTokenizer(Protocol):
    """A model that turns images into grids of codes and back.

    It is an ``nnx.Module``, and its methods can be traced by ``jit``.
    """

    @property
    def grid(self) -> tuple[int, int]: ...  # height and width in codes

    @property
    def codebook_size(self) -> int: ...

    # Hidden from isinstance checks, because these evaluate each property, and traced weights have no fingerprint.
    if TYPE_CHECKING:

        @property
        def image_size(self) -> tuple[int, int]: ...  # height and width, in pixels, of an image with this grid

        @property
        def codebook(self) -> Float[Array, "V C"]: ...  # one vector of unit length per code

        @property
        def fingerprint(self) -> str: ...  # identity of the weights: the first sixteen hex digits of their SHA-256

    def with_grid(self, grid: ArrayLike) -> "ImageTokenizer":
        """Returns a tokenizer for another grid (height, width) that shares every parameter with this one."""
        ...

    def encode_images(self, images: ArrayLike) -> tuple[Int[Array, "B T"], Float[Array, "B H W C"]]:
        """Returns the codes of images in raster order, and the L2-normalised latents before quantisation.

        Args:
          images: RGB floats in [-1, 1].
        """
        ...

    def decode_codes(self, codes: ArrayLike, height: int, width: int) -> Float[Array, "B h w 3"]:
        """Returns the images of code grids as RGB floats in [-1, 1]; a grid has ``height`` x ``width`` codes."""
        ...


@runtime_checkable
class Backbone(Protocol):
    """An autoregressive model over code grids; an ``nnx.Module``.

    It predicts codes one position at a time (``prefill``, then ``step``) or all at once (``teacher_forced``). Both ways
    give the same logits for the same codes.
    """

    @property
    def grid(self) -> tuple[int, int]: ...

    @property
    def codebook_size(self) -> int: ...

    def with_grid(self, grid: ArrayLike) -> "Backbone":
        """Returns a model over another grid (height, width) that shares every parameter with this one."""
        ...

    def check_condition(self, condition: ArrayLike, mask: ArrayLike = None) -> Condition:
        """Returns a condition that the caller gave, checked and placed on the device.

        Args:
          condition: the whole pytree, or its first array.
          mask: the second array, if ``condition`` is the first; None masks nothing.

        Raises:
          UserError: if this is not a condition of this model.
        """
        ...

    def unconditional(self, condition: Condition) -> Condition:
        """Returns the condition of the unconditional rows of classifier-free guidance."""
        ...

    def prefill(self, condition: Condition, blended_rows: int) -> tuple[Float[Array, "R D"], Cache]:
        """Runs the model on the condition; returns the input of position 0 and the cache.

        Args:
          blended_rows: number of leading rows for which ``step`` receives features; 0 if ``step`` receives none.
        """
        ...

    def step(
        self, hidden: Float[Array, "R D"], cache: Cache, position: Int[Array, ""], features: Any = None
    ) -> tuple[Float[Array, "R V"], Cache]:
        """Runs one position; returns the logits of its code and the new cache.

        Args:
          hidden: input of ``position``: the embedding of the code before it, or what ``prefill`` returned.
          features: what ``DecodePolicy.features`` returned for this position; None = nothing is blended.
        """
        ...

    def teacher_forced(
        self, condition: Condition, codes: Int[Array, "B T"], neighbors: Int[Array, "B T K"] | None = None
    ) -> Float[Array, "B T V"]:
        """Returns the logits of all positions at once; those at position t predict ``codes[:, t]``.

        Args:
          neighbors: retrieved codes, for a model with blenders; None = nothing is blended.
        """
        ...

    def embed_codes(self, codes: Int[Array, "*dims"]) -> Float[Array, "*dims D"]:
        """Returns the embeddings of codes, which ``step`` takes as ``hidden``."""
        ...


@runtime_checkable
class StatefulBackbone(Backbone, Protocol):
    """A backbone that gives the states from which it predicts codes; keys of kind "hidden" need one."""

    if TYPE_CHECKING:  # see ``ImageTokenizer``

        @property
        def backbone_fingerprint(self) -> str: ...  # identity of everything that determines the states, as hex digits

    def step_state(
        self, hidden: Float[Array, "R D"], cache: Cache, position: Int[Array, ""], features: Any = None
    ) -> tuple[Float[Array, "R D"], Cache]:
        """Runs one position as ``step`` does, and returns the state in place of the logits."""
        ...

    def states(
        self, condition: Condition, codes: Int[Array, "B T"], neighbors: Int[Array, "B T K"] | None = None
    ) -> Float[Array, "B T D"]:
        """Returns the states of all positions at once; the state at position t predicts ``codes[:, t]``."""
        ...

    def logits(self, state: Float[Array, "*dims D"]) -> Float[Array, "*dims V"]:
        """Returns the logits that states predict, float32; those of ``step`` and ``teacher_forced``."""
        ...


@runtime_checkable
class WindowBackbone(StatefulBackbone, Protocol):
    """A backbone that runs several positions in one pass; drawing with ``window`` above 1 needs one."""

    def step_states(
        self, hidden: Float[Array, "R S D"], cache: Cache, first: Int[Array, "*R"], features: Any = None
    ) -> tuple[Float[Array, "R S D"], Cache]:
        """Runs S positions per row and returns their states; each depends on the positions before its own.

        The cache may hold anything for positions from ``first`` on, and a later call may run them again.

        Args:
          hidden: inputs of the positions, as in ``step``.
          first: number of the first position: one for all rows, or one per row.
          features: what ``DecodePolicy.features`` returned for these positions, [B, S, ...].
        """
        ...


@runtime_checkable
class BlendingBackbone(Backbone, Protocol):
    """A backbone whose blenders mix features of retrieved codes into its hidden states (the paper's FAiD)."""

    @property
    def blended_neighbors(self) -> int: ...  # neighbours per position whose features ``step`` takes; 0 if it takes none

    def fused(self) -> "BlendingBackbone":
        """Returns a copy for decoding whose position-independent kernels are precomputed; all arrays are shared."""
        ...

    def retrieved_features(self, neighbors: Int[Array, "*dims K"]) -> Float[Array, "*dims K D"]:
        """Returns the features of retrieved codes, which ``step`` takes; they are zero where a code is -1."""
        ...


@runtime_checkable
class TunableModel(BlendingBackbone, ImageTokenizer, Protocol):
    """A model that FAiD's fine-tuning can train: a blending backbone together with its tokenizer."""

    def with_grid(self, grid: ArrayLike) -> "TunableModel":
        """Returns a model over another grid (height, width) that shares every parameter with this one."""
        ...

    def fused(self) -> "TunableModel":
        """Returns a copy for decoding; see ``BlendingBackbone.fused``."""
        ...

    def add_adapters(self, lora: Any, faid: Any, rngs: Any, start_silent: bool = False) -> None:
        """Adds LoRA matrices and blenders to this model, in place.

        Args:
          lora: an ``nn.lora.LoraConfig``.
          faid: an ``nn.faid.FaidConfig``; None adds no blenders.
          start_silent: initialise the blenders so that they add nothing before training.
          devices: number of devices that a training batch is split over.
        """
        ...

    def adapters(self, blenders: bool = True) -> list[Any]:
        """Returns the modules that are trained, with or without the blenders; everything else is frozen."""
        ...

    def merge_lora(self) -> None:
        """Adds the LoRA matrices to the weights that they correct, in place, and removes them."""
        ...

    def forward(
        self,
        condition: Condition,
        codes: Int[Array, "B T"],
        neighbors: Int[Array, "B T K"] | None = None,
        conditional: Bool[Array, " B"] | None = None,
        rngs: Any = None,
    ) -> tuple[Float[Array, "B T V"], Float[Array, " blenders"]]:
        """Returns the logits of ``teacher_forced``, and the mean gate of each blender.

        Args:
          conditional: rows whose caption was not dropped; None = all rows. Blenders add nothing in the other rows.
          rngs: random streams for dropout; None = no dropout.
        """
        ...


@runtime_checkable
class ImageModel(Backbone, ImageTokenizer, Protocol):
    """A backbone together with the tokenizer that made its codes."""

    def with_grid(self, grid: ArrayLike) -> "ImageModel":
        """Returns a model over another grid (height, width) that shares every parameter with this one."""
        ...


@runtime_checkable
class PromptEncoder(Protocol):
    """A function from prompts to a condition; each model family creates one from the model's folder."""

    def __call__(self, prompts: Sequence[str], length: int | None = None) -> Condition:
        """Returns the condition of B prompts, as numpy arrays [B, ...].

        Args:
          prompts: the prompts, one per image.
          length: tokens per row, for a condition made of tokens; None = the length of the longest prompt.

        Raises:
          UserError: if a prompt is not valid; the message names it and the reason.
        """
        ...

    def length(self, prompts: Sequence[str]) -> int:
        """Returns the smallest ``length`` that fits all prompts. Raises the same errors as the call."""
        ...


@runtime_checkable
class DecodePolicy(Protocol):
    """A rule for how retrieval changes the decode loop; a small frozen object that holds numbers only."""

    @property
    def uses_retrieval(self) -> bool: ...  # whether the decode loop has to search

    # Whether ``features`` returns features. A policy that blends also has an attribute ``neighbors``: the number of
    # neighbours it blends, or None for the model's own number.
    @property
    def blends(self) -> bool: ...

    def features(self, model: Any, neighbors: Neighbors, has_context: Bool[Array, "*B"]) -> Any:
        """Returns the features that the backbone's step takes; None if it takes none. Called before the step.

        Args:
          model: a ``BlendingBackbone`` if the policy blends, else any ``Backbone``.
          has_context: whether all four context positions lie on the grid: once for all rows, or once per row.
        """
        ...

    def log_probs(
        self, log_p: Float[Array, "B V"], neighbors: Neighbors, has_context: Bool[Array, "*B"]
    ) -> Float[Array, "B V"]:
        """Returns the log-probabilities to draw from. Called after the step.

        Args:
          log_p: the model's log-probabilities, after guidance, temperature and truncation.
          has_context: whether all four context positions lie on the grid: once for all rows, or once per row.
        """
        ...


class ImageBatch(NamedTuple):
    """Some of the images that a run draws.

    Attributes:
      numbers: the number of each image's prompt, counted from 0.
      images: RGB pixels.
    """

    numbers: Int[np.ndarray, " n"]
    images: UInt8[np.ndarray, "n h w 3"]


@runtime_checkable
class Benchmark(Protocol):
    """A test that ``eval`` runs: one split of prompts, and a way to score images while they are drawn.

    ``evaluation.benchmarks`` lists all benchmarks by name. A test whose images are files is a ``FolderBenchmark``.

    Attributes:
      splits: names of the splits that exist.
      images_per_prompt: number of images that every method draws per prompt, each with its own seed.
      score_name: key of the scores in results.json.
    """

    splits: tuple[str, ...]
    images_per_prompt: int
    score_name: str

    def prompts(self, number: int) -> Sequence[str]:
        """Returns the first ``number`` prompts, or all prompts if there are fewer."""
        ...

    def true_images(self, numbers: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n h w 3"] | None:
        """Returns the true images of the prompts with these numbers; None if the prompts have no images."""
        ...

    def held_out(self, number: int) -> Sequence[Mapping[str, Any]]:
        """Returns the first ``number`` examples for the likelihood measurement; empty if there are none.

        An example holds an "image", uint8 [h, w, 3], and its "caption", bytes.
        """
        ...

    def groups(self, number: int) -> Sequence[str | None]:
        """Returns the group of each of the first prompts and held-out examples; None = it belongs to none.

        ``eval`` measures each group on its own, too.
        """
        ...

    def score(self, repeats: Iterable[Iterable[ImageBatch]]) -> dict[str, Any]:
        """Returns the scores of one method as JSON values.

        If an image has a score of its own, the result holds them as "verdicts": a list per repeat with a number per
        prompt, in the order of the images. ``eval`` computes intervals from them.

        Args:
          repeats: ``images_per_prompt`` passes over all prompts, or one pass for true images. A pass yields one image
            per prompt, in batches. Images are drawn while they are read. Do not keep the batches, because there may be
            more images than fit into memory.
        """
        ...

    def table(self, scores: Mapping[str, Mapping[str, Any]]) -> str:
        """Returns a Markdown table of the scores of all methods, given by method name."""
        ...


class Prompt(NamedTuple):
    """A prompt of a prompt set.

    Attributes:
      name: differs from all other names of the set; files are named so, and the seeds of the images follow from it.
      category: "" if it has none.
      line: its line in the file, for formats with one prompt per line.
    """

    name: str
    text: str
    category: str = ""
    line: str = ""


class ImageFile(NamedTuple):
    """An image file of a prompt; ``path`` is relative to the folder of the run."""

    prompt: Prompt
    path: str


class Figure(NamedTuple):
    """A figure of a run, with the 95 % interval that ``low`` and ``high`` limit.

    Attributes:
      value: None = it was not scored.
      low, high: None = no interval is known.
      parts: the keys of ``Measurement.values`` over whose means it is the mean; () = it is not a mean over prompts.
      scale: factor from that mean to ``value``.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    parts: tuple[str, ...] = ()
    scale: float = 1.0


class Measurement(NamedTuple):
    """What a benchmark measured on the images of a folder; it is stored in results.json.

    Attributes:
      figures: by name, the most important one first.
      values: part → name of a prompt → its value and the weight of that value; runs are compared prompt by prompt.
      notes: what a reader of the figures must know, one line each.
    """

    figures: dict[str, Figure]
    values: Mapping[str, Mapping[str, tuple[float, float]]]
    notes: tuple[str, ...] = ()


@runtime_checkable
class Layout(Protocol):
    """How the images of a prompt set are named in a folder; see ``evaluation.layouts``. Paths are relative to it."""

    @property
    def name(self) -> str: ...

    def drawn(self, prompt: Prompt, copy: int, copies: int) -> str:
        """Returns the path of an image as it is drawn; a prompt has ``copies`` of them, ``copy`` counts from 0."""
        ...

    def files(self, prompt: Prompt, copies: int) -> list[str]:
        """Returns the paths of a prompt's image files in a complete folder."""
        ...

    def beside(self, prompt: Prompt) -> dict[str, str]:
        """Returns further files of a prompt: path and content."""
        ...

    def finish(self, folder: Path, prompt: Prompt, copies: int) -> None:
        """Makes the files of a prompt from its drawn images, if these are not the files themselves."""
        ...


@runtime_checkable
class FolderBenchmark(Protocol):
    """A test over a folder of images, which ``eval`` draws, or which another program has drawn.

    ``evaluation.benchmarks`` lists it by name. The class has an attribute ``flags``: the flags that it adds to
    ``eval``, by name (``command.Flag``). It is called with prompts, copies (0 = its own number) and the values of its
    flags, all by keyword.

    Attributes:
      prompts: the prompt set, sorted by name.
      copies: images per prompt.
      layout: how they are named.
    """

    prompts: Sequence[Prompt]
    copies: int
    layout: Layout

    def protocol(self) -> dict[str, Any]:
        """Returns what the figures depend on beside prompts and images, as JSON values.

        It is called before anything is drawn, and opens what scoring needs.

        Raises:
          UserError: if the images could not be scored, for example because a file is missing.
        """
        ...

    def measure(self, folder: Path, images: Sequence[ImageFile], engine: Any) -> Measurement:
        """Scores the images of a folder, in the order of the prompts; every file exists.

        Files with results may be written into the folder. An interrupted call is repeated; its result must not differ.

        Args:
          engine: a ``work.Engine``, where work on independent images may be done.
        """
        ...
