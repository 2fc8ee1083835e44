"""Samples code grids: one prefill, then one loop over the positions of the grid, for every method.

``decode.passes`` holds what happens at a position, and ``decode.parallel`` the pass that draws a window of positions
instead of one. The loop depends on no particular model or index.

The loop can end at any position and go on from there, so one compiled program draws a whole grid and streams its rows.
"""

import functools
from typing import Any, NamedTuple, SupportsFloat, SupportsIndex, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from arrag_jax.config import SamplingConfig
from arrag_jax.decode.checks import Sampling, known_codes, require_fit, sampling_of
from arrag_jax.decode.guesses import from_above
from arrag_jax.decode.parallel import Ahead, Windows
from arrag_jax.decode.passes import Passes, Run, SampleOutput
from arrag_jax.decode.policies import Plain, mixture_of
from arrag_jax.errors import UserError
from arrag_jax.forks import require_own_process
from arrag_jax.interfaces import (
    AnyRetriever,
    ArrayLike,
    Backbone,
    BlendingBackbone,
    Cache,
    Condition,
    DecodePolicy,
    StatefulBackbone,
    StoredImages,
)
from arrag_jax.mesh import context, put_everywhere, put_rows, put_state
from arrag_jax.ops.host import awaited


class Drawing(NamedTuple):
    """Grids that are being drawn; the state between two calls of ``advance``.

    Attributes:
      position: the next position to draw, one for all images, or with windows one per image; all positions before it
        are drawn.
      hidden, cache: what the backbone's step takes at this position; with windows ``hidden`` stays that of position 0.
      out: the output, [B, T, ...]; code -1 at positions that are not drawn yet.
      ahead: the guesses beyond ``position``; None without windows.
    """

    position: Int[Array, "*B"]
    hidden: Float[Array, "R D"]
    cache: Cache
    out: SampleOutput
    ahead: Ahead | None = None


def begin(
    model: Backbone,
    cond: Condition,
    uncond: Condition | None,
    policy: DecodePolicy,
    batch: int,
    return_log_probs: bool = False,
    windows: bool = False,
) -> Drawing:
    """Returns B grids of which nothing is drawn yet, after the prefill; for arguments see ``decode``.

    Args:
      windows: whether a pass will draw more than one position.
    """
    rows = cond if uncond is None else jax.tree.map(lambda *x: jnp.concatenate(x), cond, uncond)
    hidden, cache = model.prefill(rows, batch if policy.blends else 0)  # unconditional rows are never blended
    shape = (batch, int(np.prod(model.grid)))
    none, zeros = jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32)
    log_probs = jnp.zeros((*shape, model.codebook_size), jnp.float32) if return_log_probs else None
    out = SampleOutput(none, zeros, zeros, none, none, jnp.full(shape, jnp.inf, jnp.float32), log_probs, zeros, none)
    position = jnp.zeros(batch if windows else (), jnp.int32)
    return Drawing(position, hidden, cache, out, Ahead(none, position, jnp.zeros((), jnp.int32)) if windows else None)


def advance(
    model: Backbone,
    policy: DecodePolicy,
    retriever: AnyRetriever | None,
    keys: Key[Array, " B"],
    sampling: SamplingConfig | Sampling,
    stored: StoredImages | None,
    known: Int[Array, "B T"] | None,
    drawing: Drawing,
    until: Int[Array, ""] | int,
) -> Drawing:
    """Draws the positions before ``until`` that are not drawn yet; for arguments see ``decode``."""
    assert retriever is not None or not policy.uses_retrieval  # ``sample`` has checked it
    batch, guided = len(keys), len(drawing.hidden) > len(keys)
    passes = Passes(model, policy, retriever, sampling, stored, guided, known, drawing.out.log_probs is not None)

    def one_position(drawing: Drawing) -> Drawing:
        position, hidden, cache, out, _ = drawing

        def look() -> tuple[Array, Cache]:
            return cast(StatefulBackbone, model).step_state(hidden, cache, position)

        def step(features: Any, looked: tuple[Array, Cache] | None) -> tuple[Array, Cache]:
            if looked is None or policy.blends:
                return model.step(hidden, cache if looked is None else looked[1], position, features)
            return cast(StatefulBackbone, model).logits(looked[0]), looked[1]

        run = Run(look, lambda states: states[:batch], step)
        record, cache = passes.draw(jnp.asarray(out.codes), position, keys, run)
        record = record._replace(drawn_in=jnp.broadcast_to(position, (batch,)))
        hidden = model.embed_codes(jnp.tile(record.codes, 2 if guided else 1))
        put = lambda whole, new: jax.lax.dynamic_update_slice_in_dim(whole, new[:, None], position, axis=1)  # noqa: E731
        return Drawing(position + 1, hidden, cache, jax.tree.map(put, out, record))

    guess = functools.partial(from_above, width=model.grid[1]) if stored is None else stored.guesses
    windows = Windows(passes, drawing.hidden, keys, guess)
    one_pass = one_position if drawing.ahead is None else lambda drawing: Drawing(*windows.one_pass(*drawing))
    return jax.lax.while_loop(lambda drawing: (drawing.position < until).any(), one_pass, drawing)


def decode(
    model: Backbone,
    cond: Condition,
    uncond: Condition | None,
    policy: DecodePolicy,
    retriever: AnyRetriever | None,
    keys: Key[Array, " B"],
    sampling: SamplingConfig,
    return_log_probs: bool = False,
    stored: StoredImages | None = None,
    known: Int[Array, "B T"] | None = None,
) -> SampleOutput:
    """Samples B grids. The function can be traced; the caller jits it.

    Args:
      model: a ``BlendingBackbone`` that is already ``fused`` if the policy blends.
      cond, uncond: from ``Backbone.check_condition`` and ``unconditional``; ``uncond`` is None without guidance.
      retriever: may be None only for a policy that uses no retrieval.
      keys: one random key per image.
      return_log_probs: also return the whole distribution at each position.
      stored: the images that guesses of windows come from, and that no run may be copied from.
      known: codes that are taken in place of draws; -1 where a code is drawn. None = all codes are drawn.
    """
    drawing = begin(model, cond, uncond, policy, len(keys), return_log_probs, sampling.window > 1)
    return advance(model, policy, retriever, keys, sampling, stored, known, drawing, int(np.prod(model.grid))).out


@jax.jit(static_argnames=("graph", "batch", "return_log_probs", "windows"))
def _begin(graph, state, cond, uncond, policy, batch, return_log_probs, windows):
    """Runs ``begin``, compiled."""
    return begin(nnx.merge(graph, state), cond, uncond, policy, batch, return_log_probs, windows)


@jax.jit(static_argnames="graph", donate_argnames=("drawing",))
def _advance(graph, state, policy, retriever, keys, sampling, stored, known, drawing, until):
    """Runs ``advance``, compiled: one program draws a whole grid, or any part of it."""
    return advance(nnx.merge(graph, state), policy, retriever, keys, sampling, stored, known, drawing, until)


def lowered(*arguments: Any, mesh: Mesh | None) -> jax.stages.Lowered:
    """Returns the program that draws positions, lowered for arguments or their shapes; see ``advance`` for their order.

    Args:
      arguments: graph and state of the model, then policy, retriever, keys, sampling, stored, known, drawing and
        until.
    """
    with context(mesh):
        return _advance.lower(*arguments)


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


class Prepared(NamedTuple):
    """Everything that a draw needs, checked and on its devices.

    Attributes:
      rest: the arguments of ``_advance`` between the model and the drawing.
      drawing: the grids before the first position.
    """

    grid: tuple[int, int]
    model: tuple[Any, Any]
    rest: tuple[Any, ...]
    drawing: Drawing
    mesh: Mesh | None

    def until(self, position: int) -> "Prepared":
        """Returns the draw advanced to this position; ``self`` cannot be used any more."""
        with context(self.mesh):
            drawing = _advance(*self.model, *self.rest, self.drawing, np.int32(position))
        awaited(drawing.out.codes)
        return self._replace(drawing=drawing)

    def out(self) -> SampleOutput:
        """Returns the output so far, in every process of the run."""
        return self.drawing.out if self.mesh is None else put_everywhere(self.drawing.out, self.mesh)


def sample(
    model: Backbone,
    condition: ArrayLike,
    policy: DecodePolicy | None = None,
    retriever: AnyRetriever | None = None,
    cfg_scale: SupportsFloat | None = 5.0,
    temperature: SupportsFloat = 1.0,
    greedy: Any = False,
    seed: ArrayLike = 0,
    prompt_mask: ArrayLike = None,
    top_k: SupportsIndex | None = None,
    top_p: SupportsFloat | None = None,
    mesh: Mesh | None = None,
    grid: ArrayLike = None,
    return_log_probs: bool = False,
    window: SupportsIndex = 1,
    cfg_interval: SupportsIndex = -1,
    max_copied_cells: SupportsIndex | None = None,
    stored: StoredImages | None = None,
    known: ArrayLike = None,
) -> SampleOutput:
    """Generates one code grid per prompt.

    Args:
      model: a Backbone that is an ``nnx.Module``.
      condition: the model's condition, e.g. (ids, mask) or class labels int [B]. It may also be the condition's first
        array alone, e.g. prompt ids int [B, L] from BOS to image-start; ``prompt_mask`` is then the second one.
      policy: ``Plain()`` if None. retriever: required by a policy that uses retrieval.
      cfg_scale, cfg_interval, temperature, top_k, top_p, greedy, window, max_copied_cells: see
        ``config.SamplingConfig``.
      seed: one integer per image, or one integer for all. With one per image, an image depends only on its prompt and
        seed. With one for all, it also depends on the image's place in the batch.
      prompt_mask: 1 where ``condition`` holds a real token; None = everywhere.
      mesh: the batch is split over its axis "data", and large parameters over "fsdp" unless they lie on the mesh
        already. Every process calls this function with the same arguments and gets all grids. The retriever must be on
        the mesh, too. None = one device.
      stored: images of the same grid, e.g. ``retrieval.stored_codes.StoredCodes``: no run is copied from them, and
        windows take guesses from them.
      known: int [B, T], codes that are taken in place of draws, and -1 where a code is drawn; None = all are drawn. A
        code's noise does not depend on which codes are known.
      grid: height and width in codes; None = the model's. return_log_probs: also return the distributions [B, T, V].

    Raises:
      UserError: if parts are missing or do not fit together, or if the process was forked after JAX had been used.
    """
    prepared = prepare(
        model, condition, policy, retriever, cfg_scale=cfg_scale, temperature=temperature, greedy=greedy, seed=seed,
        prompt_mask=prompt_mask, top_k=top_k, top_p=top_p, mesh=mesh, grid=grid, return_log_probs=return_log_probs,
        window=window, cfg_interval=cfg_interval,
        max_copied_cells=max_copied_cells, stored=stored, known=known,
    )  # fmt: skip
    return prepared.until(int(np.prod(prepared.grid))).out()


def prepare(
    model: Backbone,
    condition: ArrayLike,
    policy: DecodePolicy | None = None,
    retriever: AnyRetriever | None = None,
    *,
    greedy: Any = False,
    seed: ArrayLike = 0,
    prompt_mask: ArrayLike = None,
    mesh: Mesh | None = None,
    grid: ArrayLike = None,
    return_log_probs: bool = False,
    cfg_scale: SupportsFloat | None = 5.0,
    stored: StoredImages | None = None,
    known: ArrayLike = None,
    **numbers: Any,
) -> Prepared:
    """Returns the draw that these arguments of ``sample`` ask for, checked and prefilled."""
    require_own_process()
    model = model if grid is None else model.with_grid(grid)
    policy = Plain() if policy is None else policy
    require_fit(model, policy, retriever)
    sampling = sampling_of(model, {"cfg_scale": cfg_scale, **numbers}, bool(greedy))
    cond = model.check_condition(condition, prompt_mask)
    if sampling.max_copied_cells is not None and stored is None:
        raise UserError("max_copied_cells needs the stored images that must not be copied: give stored=")
    if sampling.window == 1 and sampling.max_copied_cells is None:
        stored = None  # nothing reads it
    uncond = None if cfg_scale is None else model.unconditional(cond)
    keys = image_keys(seed, len(jax.tree.leaves(cond)[0]))
    if known is not None:
        known = known_codes(model, known, len(keys))
    if gate := getattr(mixture_of(policy), "gate", None):
        gate.require_rows(len(keys))
    retriever = retriever if policy.uses_retrieval else None
    graph, state = nnx.split(cast(BlendingBackbone, model).fused() if policy.blends else model)
    if mesh is not None:
        if len(keys) % mesh.shape["data"]:
            raise UserError(f"{len(keys)} prompts do not split evenly over a mesh of data={mesh.shape['data']}")
        cond, uncond, keys, known = put_rows((cond, uncond, keys, known), mesh)
        state = put_state(state, mesh)
        policy = put_everywhere(policy, mesh) if gate else policy
    with context(mesh):
        drawing = _begin(graph, state, cond, uncond, policy, len(keys), return_log_probs, sampling.window > 1)
    return Prepared(model.grid, (graph, state), (policy, retriever, keys, sampling, stored, known), drawing, mesh)
