"""Held-out likelihood in bits per code: teacher-forced, without or with a policy, as kNN-LM reports perplexity."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from arrag_jax import progress
from arrag_jax.interfaces import Backbone, Condition, DecodePolicy, ImageTokenizer, PromptEncoder, Retriever
from arrag_jax.nn.vq import from_uint8
from arrag_jax.ops.grid import context_codes, context_positions
from arrag_jax.ops.neighbors import Neighbors, empty_neighbors


class Found(NamedTuple):
    """B held-out scenes as codes with their neighbours; one search serves every model and policy.

    Attributes:
      condition: the condition of the model for these scenes.
      codes: codes of the scenes.
      neighbors: neighbours of every position, B·T rows; empty for a position without a context.
    """

    condition: Condition
    codes: Int[Array, "B T"]
    neighbors: Neighbors


class Scored(NamedTuple):
    """The inputs of a policy for B scenes, one row per position (n = B·T); computed once and used for many mixtures."""

    codes: Int[Array, " n"]
    log_p: Float[Array, "n V"]
    neighbors: Neighbors


def look_up(
    tokenizer: ImageTokenizer,
    text: PromptEncoder,
    examples: Sequence[Mapping[str, Any]],
    retriever: Retriever | None,
    batch_size: int = 50,
    limit: Callable[[list[str]], Retriever | None] | None = None,
) -> list[Found]:
    """Returns codes and neighbours of held-out scenes, in batches; shows a progress bar.

    Args:
      examples: scenes with "image" uint8 [h, w, 3] and "caption" bytes.
      retriever: None = every neighbour list is empty.
      limit: returns the retriever for the captions of a batch; it replaces ``retriever``.
    """
    graph, state = nnx.split(tokenizer)
    captions = [example["caption"].decode() for example in examples]
    condition = text(captions)
    images = np.stack([example["image"] for example in examples])
    found = []
    for start in progress.bar(range(0, len(examples), batch_size), desc="searching", unit="batch"):
        rows = slice(start, start + batch_size)
        searched = limit(captions[rows]) if limit else retriever
        codes, neighbors = _look_up(graph, state, from_uint8(images[rows]), searched)
        found.append(Found(jax.tree.map(lambda x, rows=rows: jnp.asarray(x[rows]), condition), codes, neighbors))
    return found


@jax.jit(static_argnums=0)
def _look_up(graph, state, pixels, retriever):
    codes, latents = nnx.merge(graph, state).encode_images(pixels)
    positions = jnp.asarray(context_positions(*latents.shape[1:3]))
    contexts = context_codes(codes, positions).reshape(-1, 4)
    return codes, retriever.search(contexts) if retriever else empty_neighbors(len(contexts), 1)


def score_scenes(model: Backbone, found: Sequence[Found], blend: bool = False) -> list[Scored]:
    """Returns the teacher-forced distributions of scenes from ``look_up``; shows a progress bar.

    Args:
      blend: also give the neighbours to FAiD's blenders.
    """
    graph, state = nnx.split(model)
    bar = progress.bar(found, desc="scoring", unit="batch")
    return [Scored(part.codes.reshape(-1), _score(graph, state, part, blend), part.neighbors) for part in bar]


@jax.jit(static_argnums=(0, 3))
def _score(graph, state, found, blend):
    model, blended = nnx.merge(graph, state), None
    if blend:
        blended = found.neighbors.code[:, : model.blended_neighbors].reshape(*found.codes.shape, -1)
    log_p = jax.nn.log_softmax(model.teacher_forced(found.condition, found.codes, blended))
    return log_p.reshape(-1, log_p.shape[-1])


def bits_per_code(scored: Sequence[Scored], policy: DecodePolicy, k: int | None = None) -> float:
    """Returns the mean −log2 p of the true codes under a policy, over all positions, also those without a context.

    Args:
      k: use only the k nearest neighbours; None = all that were retrieved.
    """
    total = sum(float(_bits(part, policy, k)) for part in scored)
    return total / sum(len(part.codes) for part in scored)


@jax.jit(static_argnums=2)
def _bits(part: Scored, policy: DecodePolicy, k: int | None) -> Float[Array, ""]:
    nearest = jax.tree.map(lambda x: x[:, :k], part.neighbors)
    # Positions without a context have empty neighbour lists, so a policy does not change their distributions.
    log_p = policy.log_probs(part.log_p, nearest, jnp.asarray(True))
    return -jnp.take_along_axis(log_p, part.codes[:, None], 1).sum() / jnp.log(2.0)
