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
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from arrag_jax.ops.neighbors import Neighbors

Cache = Any  # a backbone's own pytree; the decode loop only carries it
ArrayLike = Any  # what comes from outside and is checked by hand: numpy's, JAX's or another library's array, or lists


@runtime_checkable
class Retriever(Protocol):
    """Finds the stored patches whose context is nearest to the one drawn so far.

    A pytree: its arrays are leaves and pass through ``jit`` as arguments, never as constants.
    """

    k: int  # neighbours returned a query

    def search(self, context: Int[Array, "B 4"]) -> Neighbors:
        """Neighbours of B contexts given as code ids (the retriever holds the codebook).

        Four ids a row are all that crosses to the host: a callback's cost grows with its bytes.
        Rows that hold a -1 have no context and get empty neighbours. Sorted, nearest first.
        """
        ...


@runtime_checkable
class Backbone(Protocol):
    """An autoregressive model over code grids, seen one cell at a time or all at once."""

    grid: tuple[int, int]
    codebook_size: int
    blended_neighbors: int  # neighbours whose features ``step`` takes; 0: it takes none

    def with_grid(self, grid: ArrayLike) -> "Backbone":
        """The same model over another grid (height, width); it shares every parameter."""
        ...

    def fused(self) -> "Backbone":
        """The model as ``decode`` takes it for a policy that blends: all that no cell changes is worked out ahead."""
        ...

    def prefill(
        self, prompt_ids: Int[Array, "R L"], prompt_mask: Bool[Array, "R L"], blended_rows: int
    ) -> tuple[Float[Array, "R D"], Cache]:
        """Reads all prompt tokens but the last; returns the last one's embedding and the cache.

        ``blended_rows``: the first rows, to which ``step`` will be given features; 0 = it will not.
        """
        ...

    def step(
        self, hidden: Float[Array, "R D"], cache: Cache, cell: Int[Array, ""], features: Any = None
    ) -> tuple[Float[Array, "R V"], Cache]:
        """Feeds the input of ``cell`` (the embedding of what came before it): logits of its code."""
        ...

    def unconditional(self, prompt_ids: Int[Array, "B L"], prompt_mask: Bool[Array, "B L"]) -> Int[Array, "B L"]:
        """Prompts of classifier-free guidance, under the same mask."""
        ...

    def check_prompt(
        self, prompt_ids: ArrayLike, prompt_mask: ArrayLike
    ) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
        """Prompts from outside as ids and mask (None = all real), or a UserError."""
        ...

    def retrieved_features(self, neighbors: Int[Array, "*dims K"]) -> Float[Array, "*dims K D"]:
        """Features of retrieved codes, as ``step`` takes them; zeros where a code is -1."""
        ...

    def embed_codes(self, codes: Int[Array, "*dims"]) -> Float[Array, "*dims D"]:
        """Embeddings of codes, as ``step`` takes them."""
        ...


@runtime_checkable
class DecodePolicy(Protocol):
    """What retrieval does to the decode loop; a small frozen object of numbers."""

    uses_retrieval: bool
    blends: bool  # does it give the backbone features? Then it has ``neighbors`` too: of how many (None: the model's)

    def features(self, model: Backbone, neighbors: Neighbors, has_context: Bool[Array, ""]) -> Any:
        """What the backbone's step takes from the neighbours (None: nothing), before the step."""
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
