"""The words of this code base: letters for shapes and the Protocols. Read this file first.

Letters, used in every annotation:

  B batch · T cells of the grid in raster order (T = H·W) · H W grid height and width · L prompt length
  V codes in the codebook · C code dimension · E = 4C key dimension · K neighbours · N stored patches
  U entries, the different contexts among them · S shards · D model width
  R rows of a guided batch (2B with classifier-free guidance, else B)

A *cell* is one place of the code grid; its *context* is the L-shape of four cells drawn before it
(up-left, up, up-right, left). Codes are int32; an absent code, neighbour or context cell is -1.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from arrag_jax.ops.neighbors import Neighbors

Cache = Any  # a backbone's own pytree; the decode loop only carries it
Condition = Any  # what a backbone draws under: a pytree of arrays whose leaves have the batch as first axis
ArrayLike = Any  # what comes from outside and is checked by hand: numpy's, JAX's or another library's array, or lists


@runtime_checkable
class Retriever(Protocol):
    """Finds the stored patches whose context is nearest to the one drawn so far.

    A pytree: its arrays are leaves and pass through ``jit`` as arguments, never as constants.
    """

    @property
    def k(self) -> int: ...  # neighbours returned a query

    def search(self, context: Int[Array, "B 4"]) -> Neighbors:
        """Neighbours of B contexts given as code ids (the retriever holds the codebook).

        Four ids a row are all that crosses to the host: a callback's cost grows with its bytes.
        Rows that hold a -1 have no context and get empty neighbours. Sorted, nearest first.
        """
        ...


@runtime_checkable
class ImageTokenizer(Protocol):
    """Turns images into grids of codes and back; an ``nnx.Module``, whose methods may be traced."""

    @property
    def grid(self) -> tuple[int, int]: ...  # height and width in codes

    @property
    def codebook_size(self) -> int: ...

    if TYPE_CHECKING:  # a check of types at run time would compute these, and traced weights have no fingerprint

        @property
        def image_size(self) -> tuple[int, int]: ...  # height and width in pixels of an image of that grid

        @property
        def codebook(self) -> Float[Array, "V C"]: ...  # rows of length one

        @property
        def fingerprint(self) -> str: ...  # identity of the weights: sha256 over them in float32, sixteen hex digits

    def with_grid(self, grid: ArrayLike) -> "ImageTokenizer":
        """The same tokenizer for another grid (height, width); it shares every parameter."""
        ...

    def encode_images(self, images: ArrayLike) -> tuple[Int[Array, "B T"], Float[Array, "B H W C"]]:
        """Codes in raster order, and l2-normalised latents before quantisation, of floats in [-1, 1]."""
        ...

    def decode_codes(self, codes: ArrayLike, height: int, width: int) -> Float[Array, "B h w 3"]:
        """Pixels in [-1, 1] of grids of height x width codes."""
        ...


@runtime_checkable
class Backbone(Protocol):
    """An autoregressive model over code grids, seen one cell at a time or all at once; an ``nnx.Module``."""

    @property
    def grid(self) -> tuple[int, int]: ...

    @property
    def codebook_size(self) -> int: ...

    def with_grid(self, grid: ArrayLike) -> "Backbone":
        """The same model over another grid (height, width); it shares every parameter."""
        ...

    def check_condition(self, condition: ArrayLike, mask: ArrayLike = None) -> Condition:
        """The condition on the device, from one given from outside, or a UserError.

        ``condition`` is the pytree, or its first array with the mask beside it (None = nothing is masked).
        """
        ...

    def unconditional(self, condition: Condition) -> Condition:
        """The condition of the other rows of classifier-free guidance."""
        ...

    def prefill(self, condition: Condition, blended_rows: int) -> tuple[Float[Array, "R D"], Cache]:
        """Reads the condition; returns the input of cell 0 and the cache.

        ``blended_rows``: the first rows, to which ``step`` will be given features; 0 = it will not.
        """
        ...

    def step(
        self, hidden: Float[Array, "R D"], cache: Cache, position: Int[Array, ""], features: Any = None
    ) -> tuple[Float[Array, "R V"], Cache]:
        """Feeds the input of ``position`` (the embedding of what came before it): logits of its code."""
        ...

    def teacher_forced(
        self, condition: Condition, codes: Int[Array, "B T"], neighbors: Int[Array, "B T K"] | None = None
    ) -> Float[Array, "B T V"]:
        """Logits of all cells at once; row t predicts ``codes[:, t]``.

        ``neighbors``: retrieved codes for a model that blends; None = nothing is blended.
        """
        ...

    def embed_codes(self, codes: Int[Array, "*dims"]) -> Float[Array, "*dims D"]:
        """Embeddings of codes, as ``step`` takes them."""
        ...


@runtime_checkable
class BlendingBackbone(Backbone, Protocol):
    """A backbone that takes features of neighbours, as FAiD gives them."""

    @property
    def blended_neighbors(self) -> int: ...  # neighbours whose features ``step`` takes; 0: it takes none

    def fused(self) -> "BlendingBackbone":
        """A copy for ``decode``: it shares every array, and has precomputed what does not depend on the cell."""
        ...

    def retrieved_features(self, neighbors: Int[Array, "*dims K"]) -> Float[Array, "*dims K D"]:
        """Features of retrieved codes, as ``step`` takes them; zeros where a code is -1."""
        ...


@runtime_checkable
class TunableModel(BlendingBackbone, ImageTokenizer, Protocol):
    """A model that FAiD's fine-tuning can train."""

    def with_grid(self, grid: ArrayLike) -> "TunableModel":
        """The same model over another grid (height, width); it shares every parameter."""
        ...

    def fused(self) -> "TunableModel":
        """As in ``BlendingBackbone``."""
        ...

    def add_adapters(self, lora: Any, faid: Any, rngs: Any, start_silent: bool = False, devices: int = 1) -> None:
        """Adds a LoRA (``nn.lora.LoraConfig``) and blenders (``nn.faid.FaidConfig``; None: none), in place."""
        ...

    def adapters(self, blenders: bool = True) -> list[Any]:
        """The modules that are trained; all else is frozen."""
        ...

    def merge_lora(self) -> None:
        """Adds the LoRA to the weights that it corrects, in place."""
        ...

    def forward(
        self,
        condition: Condition,
        codes: Int[Array, "B T"],
        neighbors: Int[Array, "B T K"] | None = None,
        conditional: Bool[Array, " B"] | None = None,
        rngs: Any = None,
    ) -> tuple[Float[Array, "B T V"], Float[Array, " blenders"]]:
        """``teacher_forced``, and each blender's mean gate.

        ``conditional``: rows that still have their caption (None: all); blenders are silent in the others.
        ``rngs``: for dropout; None = no dropout.
        """
        ...


@runtime_checkable
class ImageModel(Backbone, ImageTokenizer, Protocol):
    """A backbone together with the tokenizer of its codes."""

    def with_grid(self, grid: ArrayLike) -> "ImageModel":
        """The same model over another grid (height, width); it shares every parameter."""
        ...


@runtime_checkable
class PromptEncoder(Protocol):
    """Turns prompts into a condition; the model's family makes it from the model's folder."""

    def __call__(self, prompts: Sequence[str], length: int | None = None) -> Condition:
        """The condition of prompts, as numpy arrays [B, ...].

        Args:
          prompts: a UserError tells which of them cannot be a prompt, and why.
          length: tokens of each row, where the condition has any; None = as many as the longest prompt has.
        """
        ...


@runtime_checkable
class DecodePolicy(Protocol):
    """What retrieval does to the decode loop; a small frozen object of numbers."""

    @property
    def uses_retrieval(self) -> bool: ...

    @property
    def blends(self) -> bool:
        # does it give the backbone features? Then it has ``neighbors`` too: of how many (None: the model's)
        ...

    def features(self, model: Any, neighbors: Neighbors, has_context: Bool[Array, ""]) -> Any:
        """What the backbone's step takes from the neighbours (None: nothing), before the step.

        ``model`` is a ``BlendingBackbone`` where the policy blends, else any ``Backbone``.
        """
        ...

    def log_probs(
        self, log_p: Float[Array, "B V"], neighbors: Neighbors, has_context: Bool[Array, ""]
    ) -> Float[Array, "B V"]:
        """The distribution to draw from, after guidance and temperature."""
        ...


class ImageBatch(NamedTuple):
    """Some images of a run.

    Attributes:
      numbers: of their prompts, from 0.
      images: RGB.
    """

    numbers: Int[np.ndarray, " n"]
    images: UInt8[np.ndarray, "n h w 3"]


@runtime_checkable
class Benchmark(Protocol):
    """What ``eval`` measures on: one split of prompts, and how images of them are scored.

    ``evaluation.benchmarks`` lists all benchmarks by name.

    Attributes:
      splits: names of the splits that there are.
      images_per_prompt: images that every method draws of each prompt, with seeds of their own.
      score_name: key of the scores in results.json.
    """

    splits: tuple[str, ...]
    images_per_prompt: int
    score_name: str

    def prompts(self, number: int) -> Sequence[str]:
        """Returns the first ``number`` prompts, or all if there are fewer."""
        ...

    def true_images(self, numbers: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n h w 3"] | None:
        """Returns the images that belong to prompts of these numbers; None if prompts have no images."""
        ...

    def held_out(self, number: int) -> Sequence[Mapping[str, Any]]:
        """Returns the first ``number`` examples whose likelihood is measured; empty if there are none.

        An example has an "image", uint8 [h, w, 3], and its "caption", bytes.
        """
        ...

    def score(self, repeats: Iterable[Iterable[ImageBatch]]) -> dict[str, Any]:
        """Returns the scores of one method as JSON values.

        Args:
          repeats: ``images_per_prompt`` times (true images: once) one image of every prompt, in batches. They are
            drawn while they are read, and no batch should be kept: there may be more images than fit into memory.
        """
        ...

    def table(self, scores: Mapping[str, Mapping[str, Any]]) -> str:
        """Returns the scores of all methods, by their names, as a table in Markdown."""
        ...
