"""Computes attention: over a cache, or causally over a complete sequence with the kernel of the target platform."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from arrag_jax.mesh import on_own_rows
from arrag_jax.ops import products

LANES = 128  # a TPU kernel takes heads whose width is a multiple of this, and sequences that are padded to one
BLOCKS = (512, 384, 256, LANES)  # tokens of a tile; the largest that divides the padded length is chosen


def attend(
    q: Float[Array, "R S heads hd"],
    k: Float[Array, "R KH P hd"],
    v: Float[Array, "R KH P hd"],
    mask: Bool[Array, "R S P"],
) -> Float[Array, "R S heads hd"]:
    """Returns scaled dot-product attention; keys and values have the head before the slot in memory.

    With this layout the products read the cache without a copy. ``jax.nn.dot_product_attention`` takes [R, P, KH, hd],
    for which XLA transposes the whole cache at every step; this more than doubles the time on a CPU. Queries get the
    same layout first, which makes gradients a third cheaper on a CPU. A single bfloat16 query is duplicated, because a
    CPU takes five times longer for one than for two (docs/LOG.md, 2026-11-26).
    """
    rows, length, heads, _ = q.shape
    sharing = heads // k.shape[1]  # queries that share one key
    grouped = q.reshape(rows, length, k.shape[1], sharing, -1).transpose(0, 2, 3, 1, 4)
    queries = grouped.reshape(rows, k.shape[1], sharing * length, -1)
    if sharing * length == 1 and q.dtype != jnp.float32:
        queries = jnp.repeat(queries, 2, axis=2)
    scores = products.einsum("rkad,rkpd->rkap", queries, k) * q.shape[-1] ** -0.5
    seen = jnp.tile(mask, (1, sharing, 1))[:, None]
    shares = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min))
    y = products.einsum("rkap,rkpd->rkad", shares.astype(v.dtype), v).astype(q.dtype)
    return y[:, :, : sharing * length].reshape(grouped.shape).transpose(0, 3, 1, 2, 4).reshape(q.shape)


def attend_causally(
    q: Float[Array, "R S heads hd"],
    k: Float[Array, "R KH S hd"],
    v: Float[Array, "R KH S hd"],
    filled: Bool[Array, "R S"],
) -> Float[Array, "R S heads hd"]:
    """Returns attention of complete sequences, in which a token attends to itself and to the filled tokens before it.

    On a TPU, JAX's splash attention computes it tile by tile, so that no array holds the scores of all pairs of tokens:
    writing and reading these took most of a training step's memory traffic (docs/LOG.md, 2026-11-27). There the outputs
    of tokens that are not filled differ, which no filled token attends to.
    """

    def by_pairs(q: Array, k: Array, v: Array, filled: Array) -> Array:
        return attend(q, k, v, causal_mask(filled))

    if q.shape[-1] % LANES:
        return by_pairs(q, k, v, filled)
    by_tiles = functools.partial(on_own_rows, _by_tiles)
    return jax.lax.platform_dependent(q, k, v, filled, tpu=by_tiles, default=by_pairs)


def _by_tiles(q: Array, k: Array, v: Array, filled: Array) -> Array:
    """Does the same as ``attend_causally`` on a TPU, for the rows of one device."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # imported here because it is slow to load

    length, heads = q.shape[1:3]
    room = -length % LANES
    block = next(size for size in BLOCKS if (length + room) % size == 0)
    sizes = splash.BlockSizes(block, block, block, block, block, block, block, block)
    mask = splash.splash_attention_mask.MultiHeadMask([splash.CausalMask((length + room,) * 2)] * heads)
    kernel = splash.make_splash_mha_single_device(mask, block_sizes=sizes)

    def padded(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, room), (0, 0)))

    # A token sees those of its own segment: filled tokens are one, all others another.
    segment = jnp.pad(filled, ((0, 0), (0, room))).astype(jnp.int32)
    queries = padded((q * q.shape[-1] ** -0.5).swapaxes(1, 2))
    y = jax.vmap(kernel)(queries, padded(k), padded(v), splash.SegmentIds(segment, segment))
    return y[:, :, :length].swapaxes(1, 2)


def causal_mask(filled: Bool[Array, "R S"]) -> Bool[Array, "R S S"]:
    """Returns the causal mask: earlier filled tokens, and the token itself, so that no row is empty and becomes NaN."""
    length = filled.shape[1]
    past, itself = jnp.tri(length, dtype=bool), jnp.eye(length, dtype=bool)
    return (past[None] & filled[:, None]) | itself[None]
