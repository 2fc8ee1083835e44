"""Held-out likelihood in bits per code: teacher-forced, without or with a policy, as kNN-LM reports perplexity."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from arrag_jax import progress
from arrag_jax.interfaces import (
    AnyRetriever,
    AroundRetriever,
    Backbone,
    Condition,
    DecodePolicy,
    ImageTokenizer,
    PromptEncoder,
    StateRetriever,
)
from arrag_jax.nn.vq import from_uint8
from arrag_jax.ops.grid import around_codes, around_positions, context_codes, context_positions
from arrag_jax.ops.neighbors import Neighbors, empty_neighbors


class Found(NamedTuple):
    """B held-out scenes as codes with their neighbours; one search serves every model and policy.

    Attributes:
      condition: the condition of the model for these scenes.
      codes: codes of the scenes.
      neighbors: neighbours of every position, B·T rows; empty for a position without a context.
      captions: the scenes' captions.
    """

    condition: Condition
    codes: Int[Array, "B T"]
    neighbors: Neighbors
    captions: tuple[str, ...]


class Scored(NamedTuple):
    """The inputs of a policy for B scenes, one row per position (n = B·T); computed once and used for many mixtures."""

    codes: Int[Array, " n"]
    log_p: Float[Array, "n V"]
    neighbors: Neighbors
    captions: tuple[str, ...] = ()


def look_up(
    tokenizer: ImageTokenizer,
    text: PromptEncoder,
    examples: Sequence[Mapping[str, Any]],
    retriever: AnyRetriever | None,
    batch_size: int = 50,
    limit: Callable[[list[str]], AnyRetriever | None] | None = None,
) -> list[Found]:
    """Returns codes and neighbours of held-out scenes, in batches; shows a progress bar.

    Args:
      tokenizer: encodes the scenes; a search by state also runs it as a ``StatefulBackbone``.
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
        given = jax.tree.map(lambda x, rows=rows: jnp.asarray(x[rows]), condition)
        codes, neighbors = _look_up(graph, state, from_uint8(images[rows]), given, searched)
        found.append(Found(given, codes, neighbors, tuple(captions[rows])))
    return found


@jax.jit(static_argnums=0)
def _look_up(graph, state, pixels, condition, retriever):
    model = nnx.merge(graph, state)
    codes, latents = model.encode_images(pixels)
    if isinstance(retriever, StateRetriever):
        states = model.states(condition, codes)
        flat, cells = states.reshape(-1, states.shape[2]), jnp.arange(codes.shape[1])
        return codes, retriever.search_states(flat, jnp.repeat(codes, len(cells), 0), jnp.tile(cells, len(codes)))
    if isinstance(retriever, AroundRetriever):
        around = jnp.tile(around_positions(*latents.shape[1:3]), (len(codes), 1))
        return codes, retriever.search_around(around_codes(jnp.repeat(codes, codes.shape[1], 0), None, around))
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
    return [
        Scored(
            part.codes.reshape(-1),
            _score(graph, state, part.condition, part.codes, part.neighbors, blend),
            part.neighbors,
            part.captions,
        )
        for part in bar
    ]


@jax.jit(static_argnums=(0, 5))
def _score(graph, state, condition, codes, neighbors, blend):
    model, blended = nnx.merge(graph, state), None
    if blend:
        blended = neighbors.code[:, : model.blended_neighbors].reshape(*codes.shape, -1)
    log_p = jax.nn.log_softmax(model.teacher_forced(condition, codes, blended))
    return log_p.reshape(-1, log_p.shape[-1])


def bits_per_code(
    scored: Sequence[Scored], policy: DecodePolicy | Callable[[tuple[str, ...]], DecodePolicy], k: int | None = None
) -> float:
    """Returns the mean −log2 p of the true codes under a policy, over all positions, also those without a context.

    Args:
      policy: the policy, or a function from the captions of a batch to their policy, for one with a gate.
      k: use only the k nearest neighbours; None = all that were retrieved.
    """
    return float(np.concatenate(bits_of_codes(scored, policy, k)).mean())


def bits_of_codes(
    scored: Sequence[Scored], policy: DecodePolicy | Callable[[tuple[str, ...]], DecodePolicy], k: int | None = None
) -> list[Float[np.ndarray, " n"]]:
    """Returns −log2 p of the true code at every position of each batch; arguments as in ``bits_per_code``."""

    def bits(part: Scored) -> np.ndarray:
        own = policy if isinstance(policy, DecodePolicy) else policy(part.captions)
        return np.asarray(_bits(part.codes, part.log_p, part.neighbors, own, k), np.float64)

    return [bits(part) for part in scored]


@jax.jit(static_argnums=4)
def _bits(codes, log_p, neighbors, policy, k):
    nearest = jax.tree.map(lambda x: x[:, :k], neighbors)
    # Positions without a context have empty neighbour lists, so a policy does not change their distributions.
    log_p = policy.log_probs(log_p, nearest, jnp.asarray(True))
    return -jnp.take_along_axis(log_p, codes[:, None], 1)[:, 0] / jnp.log(2.0)
