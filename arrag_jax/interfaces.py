"""The words of this code base: letters for shapes and the three Protocols. Read this file first.

Letters, used in every annotation:

  B batch · T cells of the grid in raster order (T = H·W) · H W grid height and width · L prompt length
  V codes in the codebook · C code dimension · E = 4C key dimension · K neighbours · N stored patches
  U entries, the different contexts among them · S shards · D model width
  R rows of a guided batch (2B with classifier-free guidance, else B)

A *cell* is one place of the code grid; its *context* is the L-shape of four cells drawn before it
(up-left, up, up-right, left). Codes are int32; an absent code, neighbour or context cell is -1.
"""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Int

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
