"""Samples code grids: one prefill, then one ``lax.scan`` over the positions of the grid, for every method.

Each position runs these steps: context → search → policy's features → backbone step → guidance → policy's mixture →
sampled code. A search by context needs only codes that were sampled before this position. It therefore does not wait
for the backbone's step, unless the policy feeds the neighbours into that step. A search by the backbone's state
(``interfaces.StateRetriever``) runs between the step and the mixture. The loop depends on no particular model or index.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple, SupportsFloat, SupportsIndex, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from arrag_jax.config import SamplingConfig
from arrag_jax.decode.policies import Plain, weights_of
from arrag_jax.errors import UserError
from arrag_jax.forks import require_own_process
from arrag_jax.interfaces import (
    ArrayLike,
    Backbone,
    BlendingBackbone,
    Condition,
    DecodePolicy,
    Retriever,
    StatefulBackbone,
    StateRetriever,
)
from arrag_jax.mesh import put_everywhere, put_rows
from arrag_jax.ops import handles
from arrag_jax.ops.grid import context_codes, context_positions, has_context
from arrag_jax.ops.host import awaited
from arrag_jax.ops.neighbors import empty_neighbors
from arrag_jax.ops.sampling import draw, guide, truncate


class SampleOutput(NamedTuple):
    """Sampled code grids, and where each code came from.

    Attributes:
      codes: sampled codes in raster order.
      log_p: log-probability with which each code was sampled. It includes mixture, truncation and temperature.
      log_p_model: the same under the model's distribution, before the policy. The difference of the two is the effect
        of retrieval.
      source: stored row of the nearest neighbour that holds the sampled code; -1 if no neighbour holds it.
      rank: rank of that neighbour, 0 = nearest; -1 if no neighbour holds the code.
      distance: squared L2 distance of that neighbour; +inf if no neighbour holds the code.
      log_probs: the whole distribution from which each code was sampled; None unless requested.
      weight: the share λ that the policy gave to the neighbours' distribution; 0 where it mixed nothing.
    """

    codes: Int[Array | np.ndarray, "B T"]
    log_p: Float[Array | np.ndarray, "B T"]
    log_p_model: Float[Array | np.ndarray, "B T"]
    source: Int[Array | np.ndarray, "B T"]
    rank: Int[Array | np.ndarray, "B T"]
    distance: Float[Array | np.ndarray, "B T"]
    log_probs: Float[Array | np.ndarray, "B T V"] | None = None
    weight: Float[Array | np.ndarray, "B T"] | None = None


def decode(
    model: Backbone,
    cond: Condition,
    uncond: Condition | None,
    policy: DecodePolicy,
    retriever: Retriever | StateRetriever | None,
    keys: Key[Array, " B"],
    sampling: SamplingConfig,
    on_position: Callable[[Any], None] | None = None,
    return_log_probs: bool = False,
) -> SampleOutput:
    """Samples B grids. The function can be traced; the caller jits it.

    Args:
      model: a ``BlendingBackbone`` that is already ``fused`` if the policy blends.
      cond, uncond: from ``Backbone.check_condition`` and ``unconditional``; ``uncond`` is None without guidance.
      retriever: may be None only for a policy that uses no retrieval.
      keys: one random key per image.
      on_position: called during tracing with the number of each finished position, e.g. to insert a host callback.
      return_log_probs: also return the whole distribution at each position.
    """
    height, width = model.grid
    positions, batch = height * width, len(keys)
    rows = cond if uncond is None else jax.tree.map(lambda *x: jnp.concatenate(x), cond, uncond)
    hidden, cache = model.prefill(rows, batch if policy.blends else 0)  # unconditional rows are never blended
    nothing, everywhere = empty_neighbors(batch, 1), jnp.asarray(True)
    assert retriever is not None or not policy.uses_retrieval  # ``sample`` has checked it

    def one_position(carry, this):
        drawn, hidden, cache = carry
        position, context, complete = this
        if isinstance(retriever, StateRetriever):
            stateful = cast(StatefulBackbone, model)
            state, cache = stateful.step_state(hidden, cache, position)
            logits, complete = stateful.logits(state), everywhere
            neighbors = retriever.search_states(state[:batch], drawn, jnp.repeat(position, batch))
        else:
            neighbors = nothing if retriever is None else retriever.search(context_codes(drawn, context))
            features = policy.features(model, neighbors, complete)
            logits, cache = model.step(hidden, cache, position, features)
        scale = None if uncond is None else sampling.cfg_scale
        log_p_model = truncate(guide(logits, scale), sampling.temperature, sampling.top_k, sampling.top_p)
        log_p = policy.log_probs(log_p_model, neighbors, complete)
        code = draw(log_p, keys, position, sampling.greedy)
        drawn = jax.lax.dynamic_update_slice_in_dim(drawn, code[:, None], position, axis=1)
        hidden = model.embed_codes(code if uncond is None else jnp.tile(code, 2))
        if on_position is not None:
            on_position(position)
        weight = weights_of(policy, log_p_model, neighbors, complete)
        record = _record(code, log_p, log_p_model, neighbors, weight)
        return (drawn, hidden, cache), record._replace(log_probs=log_p if return_log_probs else None)

    start = jnp.full((batch, positions), -1, jnp.int32)
    this = (
        jnp.arange(positions),
        jnp.asarray(context_positions(height, width)),
        jnp.asarray(has_context(height, width)),
    )
    _, records = jax.lax.scan(one_position, (start, hidden, cache), this)
    return jax.tree.map(lambda x: x.swapaxes(0, 1), records)


def _record(code, log_p, log_p_model, neighbors, weight) -> SampleOutput:
    """Returns what is kept of one position; each field has the shape [B]."""
    hit = neighbors.code == code[:, None]
    found, rank = jnp.any(hit, axis=1), jnp.argmax(hit, axis=1)  # the first hit is the nearest
    at = lambda x, i: jnp.take_along_axis(x, i[:, None], 1)[:, 0]  # noqa: E731
    return SampleOutput(
        codes=code,
        log_p=at(log_p, code),
        log_p_model=at(log_p_model, code),
        source=jnp.where(found, at(neighbors.id, rank), -1),
        rank=jnp.where(found, rank, -1).astype(jnp.int32),
        distance=jnp.where(found, at(neighbors.distance, rank), jnp.inf),
        weight=weight,
    )


@jax.jit(static_argnames=("graph", "sampling", "return_log_probs"))
def _decode(graph, state, cond, uncond, policy, retriever, keys, sampling, listener, return_log_probs):
    """Runs ``decode``, compiled. ``listener`` is the number of a host function's handle, or None."""
    model = nnx.merge(graph, state)
    on_position = None if listener is None else lambda position: jax.debug.callback(_tell, listener, position)
    return decode(model, cond, uncond, policy, retriever, keys, sampling, on_position, return_log_probs)


def _tell(listener: Any, position: Any) -> None:
    """Calls the host function with this number if its handle still exists."""
    on_position = handles.look_up(listener)
    if on_position is not None:
        on_position(position)


def image_keys(seed: ArrayLike, batch: int) -> Key[Array, " batch"]:
    """Returns one random key per image.

    Args:
      seed: one seed per image, or one seed for all; then the key depends on the image's place in the batch, too.

    Raises:
      UserError: if ``seed`` is not an integer, or the number of seeds is not the number of images.
    """
    seeds = np.asarray(seed)
    if seeds.ndim > 1 or not np.issubdtype(seeds.dtype, np.integer):
        raise UserError(f"seed = {seed!r} must be a whole number, or one per prompt")
    if seeds.ndim == 0:
        return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(int(seeds)), i))(jnp.arange(batch))
    if len(seeds) != batch:
        raise UserError(f"{len(seeds)} seeds for {batch} prompts; give one seed, or one per prompt")
    return jax.vmap(jax.random.key)(jnp.asarray(seeds))


def require_blenders(model: Backbone, retriever: Retriever, neighbors: int | None = None) -> None:
    """Raises UserError unless the model has blenders and the search returns enough neighbours for them.

    Args:
      neighbors: how many neighbours are blended; None = the model's own number.
    """
    blended = getattr(model, "blended_neighbors", 0)
    if not blended:
        raise UserError("this checkpoint has no FAiD blenders; decode it with --method plain or daid")
    wanted = blended if neighbors is None else neighbors
    if not 1 <= wanted <= retriever.k:
        raise UserError(f"FAiD blends {wanted} neighbours, the search gives k={retriever.k}; raise k")


def require_states(model: Backbone, policy: DecodePolicy) -> None:
    """Raises UserError unless the model and the policy can work with a search by the backbone's state."""
    if not isinstance(model, StatefulBackbone):
        raise UserError(f"{type(model).__name__} does not give its states, so hidden keys cannot be searched with it")
    if policy.blends:
        raise UserError(
            "FAiD needs its neighbours before the backbone's step, but hidden keys are searched after it; choose "
            "keys=codebook or keys=latent"
        )


def _number(name: str, value: Any) -> Any:
    """Returns a number of any library as a Python number, which can be hashed; None stays None."""
    try:
        return value if value is None else operator.index(value) if name == "top_k" else float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} = {value!r} must be one number") from error


def _sampling(model: Backbone, numbers: dict[str, Any], greedy: bool) -> SamplingConfig:
    """Returns the settings of ``sample`` as a ``SamplingConfig``.

    Raises:
      UserError: if a setting is invalid.
    """
    sampling = SamplingConfig(**{name: _number(name, value) for name, value in numbers.items()}, greedy=greedy)
    if sampling.top_k is not None and sampling.top_k > model.codebook_size:
        raise UserError(f"top_k = {sampling.top_k} is more than the {model.codebook_size} codes there are")
    return sampling


def _require_fit(model: Backbone, policy: DecodePolicy, retriever: Retriever | StateRetriever | None) -> None:
    """Raises UserError unless the model and the search give what the policy needs."""
    if policy.uses_retrieval and retriever is None:
        raise UserError(f"{type(policy).__name__} needs a retriever: build a datastore, or draw with --method plain")
    if policy.uses_retrieval and isinstance(retriever, StateRetriever):
        require_states(model, policy)
    elif policy.blends and retriever is not None:
        require_blenders(model, cast(Retriever, retriever), getattr(policy, "neighbors", None))


def sample(
    model: Backbone,
    condition: ArrayLike,
    policy: DecodePolicy | None = None,
    retriever: Retriever | StateRetriever | None = None,
    cfg_scale: SupportsFloat | None = 5.0,
    temperature: SupportsFloat = 1.0,
    greedy: Any = False,
    seed: ArrayLike = 0,
    prompt_mask: ArrayLike = None,
    top_k: SupportsIndex | None = None,
    top_p: SupportsFloat | None = None,
    on_position: Callable[[Any], None] | None = None,
    mesh: Mesh | None = None,
    grid: ArrayLike = None,
    return_log_probs: bool = False,
) -> SampleOutput:
    """Generates one code grid per prompt.

    Args:
      model: a Backbone that is an ``nnx.Module``.
      condition: the model's condition, e.g. (ids, mask) or class labels int [B]. It may also be the condition's first
        array alone, e.g. prompt ids int [B, L] from BOS to image-start; ``prompt_mask`` is then the second one.
      policy: ``Plain()`` if None. retriever: required by a policy that uses retrieval.
      cfg_scale, temperature, top_k, top_p, greedy: see ``config.SamplingConfig``.
      seed: one integer per image, or one integer for all. With one per image, an image depends only on its prompt and
        seed. With one for all, it also depends on the image's place in the batch.
      prompt_mask: 1 where ``condition`` holds a real token; None = everywhere.
      on_position: host function that is called with the number of each finished position.
      mesh: the batch is split over its axis "data", and every device gets a copy of the model. Every process calls this
        function with the same arguments and gets all grids. The retriever must be on the mesh, too. None = one device.
      grid: height and width in codes; None = the model's. return_log_probs: also return the distributions [B, T, V].

    Raises:
      UserError: if parts are missing or do not fit together, or if the process was forked after JAX had been used.
    """
    require_own_process()
    model = model if grid is None else model.with_grid(grid)
    policy = Plain() if policy is None else policy
    _require_fit(model, policy, retriever)
    numbers = {"cfg_scale": cfg_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    sampling = _sampling(model, numbers, bool(greedy))
    cond = model.check_condition(condition, prompt_mask)
    uncond = None if cfg_scale is None else model.unconditional(cond)
    keys = image_keys(seed, len(jax.tree.leaves(cond)[0]))
    if gate := getattr(policy, "gate", None):
        gate.require_rows(len(keys))
    retriever = retriever if policy.uses_retrieval else None
    graph, state = nnx.split(cast(BlendingBackbone, model).fused() if policy.blends else model)
    if mesh is not None:
        if len(keys) % mesh.shape["data"]:
            raise UserError(f"{len(keys)} prompts do not split evenly over a mesh of data={mesh.shape['data']}")
        cond, uncond, keys = put_rows((cond, uncond, keys), mesh)
        state = put_everywhere(state, mesh)
        policy = put_everywhere(policy, mesh) if gate else policy
    told = None if on_position is None else handles.Handle(on_position)
    listener = None if told is None else np.int32(told.number)
    drawn = _decode(graph, state, cond, uncond, policy, retriever, keys, sampling, listener, return_log_probs)
    awaited(drawn.codes)
    return drawn if mesh is None else put_everywhere(drawn, mesh)
