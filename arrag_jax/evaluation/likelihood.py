"""Held-out likelihood in bits a code: teacher-forced, plain or under a policy, as kNN-LM reports perplexity."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from arrag_jax.evaluation.drawing import Studio
from arrag_jax.interfaces import DecodePolicy, Retriever
from arrag_jax.nn.vq import from_uint8
from arrag_jax.ops.grid import context_cells
from arrag_jax.ops.neighbors import Neighbors, empty_neighbors


class Scored(NamedTuple):
    """What the policies need of B scenes, one row a cell (n = B·T): computed once, mixed many times."""

    codes: Int[Array, " n"]
    log_p: Float[Array, "n V"]
    neighbors: Neighbors


def score_scenes(
    studio: Studio, examples: Sequence[dict[str, Any]], retriever: Retriever | None, batch_size: int = 50
) -> list[Scored]:
    """Teacher-forced distributions and neighbours of held-out scenes, in batches, with a progress bar.

    Args:
      examples: scenes with "image" uint8 [h, w, 3] and "caption" bytes.
      retriever: None leaves every neighbour list empty.
    """
    graph, state = nnx.split(studio.model)
    ids, mask = studio.text([example["caption"].decode() for example in examples])
    images = np.stack([example["image"] for example in examples])
    scored = []
    for start in tqdm(range(0, len(examples), batch_size), desc="scoring", unit="batch", dynamic_ncols=True):
        rows = slice(start, start + batch_size)
        pixels = from_uint8(images[rows])
        scored.append(_score(graph, state, pixels, jnp.asarray(ids[rows]), jnp.asarray(mask[rows]), retriever))
    return scored


@jax.jit(static_argnums=0)
def _score(graph, state, pixels, ids, mask, retriever) -> Scored:
    model = nnx.merge(graph, state)
    codes = model.gen_vision_model.encode(pixels)[0].reshape(len(ids), -1)
    log_p = jax.nn.log_softmax(model.teacher_forced(ids, mask, codes))
    cells = jnp.asarray(context_cells(*model.grid))
    contexts = jnp.where(cells[None] >= 0, codes[:, jnp.maximum(cells, 0)], -1).reshape(-1, 4)
    neighbors = retriever.search(contexts) if retriever else empty_neighbors(len(contexts), 1)
    return Scored(codes.reshape(-1), log_p.reshape(-1, log_p.shape[-1]), neighbors)


def bits_per_code(scored: Sequence[Scored], policy: DecodePolicy, k: int | None = None) -> float:
    """Mean −log2 p of the true codes under a policy, over all cells, those without a context included.

    Args:
      k: use only the k nearest neighbours; None = all that were retrieved.
    """
    total = sum(float(_bits(part, policy, k)) for part in scored)
    return total / sum(len(part.codes) for part in scored)


@jax.jit(static_argnums=2)
def _bits(part: Scored, policy: DecodePolicy, k: int | None) -> Float[Array, ""]:
    nearest = jax.tree.map(lambda x: x[:, :k], part.neighbors)
    # Cells without a context have empty neighbour lists, which a policy leaves alone.
    log_p = policy.log_probs(part.log_p, nearest, jnp.asarray(True))
    return -jnp.take_along_axis(log_p, part.codes[:, None], 1).sum() / jnp.log(2.0)
