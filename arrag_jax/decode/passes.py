"""Draws some positions of B pictures in one pass of the model, which is what every decode loop consists of.

A pass runs these steps: context → search → policy's features → backbone → guidance → policy's mixture → drawn code. A
search by context needs only codes before its position. It therefore does not wait for the backbone, unless the policy
feeds the neighbours into it. A search by the backbone's state (``interfaces.StateRetriever``) runs between the backbone
and the mixture; if the policy feeds its neighbours into the backbone, the backbone runs twice, first without them. A
draw takes its noise from the picture's key and the number of the position alone (``ops.sampling.draw``), so a position
that is drawn again after the same codes gets the same code.

Some codes may be known before the drawing. They are taken in place of draws, and change other draws only as codes that
the model, the search and the policy see.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from arrag_jax.config import SamplingConfig
from arrag_jax.decode.checks import Sampling
from arrag_jax.decode.policies import weights_of
from arrag_jax.interfaces import (
    AnyRetriever,
    AroundRetriever,
    Backbone,
    Cache,
    DecodePolicy,
    Retriever,
    StateRetriever,
    StoredImages,
)
from arrag_jax.ops.grid import around_codes, around_positions, context_codes, context_positions, has_context
from arrag_jax.ops.neighbors import Neighbors, empty_neighbors
from arrag_jax.ops.sampling import draw, guide, truncate, without


class SampleOutput(NamedTuple):
    """Sampled code grids, and where each code came from.

    Attributes:
      codes: sampled codes in raster order; known ones where they were given. What follows tells nothing of known codes:
        there, log-probabilities and weight are 0, and there is no neighbour.
      log_p: log-probability with which each code was sampled. It includes mixture, truncation and temperature.
      log_p_model: the same under the model's distribution, before the policy. The difference of the two is the effect
        of retrieval.
      source: stored row of the nearest neighbour that holds the sampled code; -1 if no neighbour holds it.
      rank: rank of that neighbour, 0 = nearest; -1 if no neighbour holds the code.
      distance: squared L2 distance of that neighbour; +inf if no neighbour holds the code.
      log_probs: the whole distribution from which each code was sampled; None unless requested.
      weight: the share λ that the policy gave to the neighbours' distribution; 0 where it mixed nothing.
      drawn_in: number of the pass of the model that drew each code, counted from 0; the position without windows.
    """

    codes: Int[Array | np.ndarray, "B T"]
    log_p: Float[Array | np.ndarray, "B T"]
    log_p_model: Float[Array | np.ndarray, "B T"]
    source: Int[Array | np.ndarray, "B T"]
    rank: Int[Array | np.ndarray, "B T"]
    distance: Float[Array | np.ndarray, "B T"]
    log_probs: Float[Array | np.ndarray, "B T V"] | None = None
    weight: Float[Array | np.ndarray, "B T"] | None = None
    drawn_in: Int[Array | np.ndarray, "B T"] | None = None


class Run(NamedTuple):
    """The backbone at the positions of a pass, with R rows per position.

    Attributes:
      look: returns states without features, and the cache after them.
      states_of: returns the rows of these states that belong to the pass's rows, for the search.
      step: takes the policy's features, and what ``look`` returned (None if it was not called); returns the logits and
        the new cache.
    """

    look: Callable[[], tuple[Array, Cache]]
    states_of: Callable[[Array], Float[Array, "n D"]]
    step: Callable[[Any, tuple[Array, Cache] | None], tuple[Float[Array, "R V"], Cache]]


@dataclasses.dataclass(frozen=True)
class Passes:
    """What all passes over a batch share: the arguments of ``loop.advance``.

    Attributes:
      model, policy, retriever, sampling, stored, known, return_log_probs: as in ``loop.decode``.
      guided: whether the model's rows are the conditional ones, then the unconditional ones.
    """

    model: Backbone
    policy: DecodePolicy
    retriever: AnyRetriever | None
    sampling: SamplingConfig | Sampling
    stored: StoredImages | None
    guided: bool
    known: Int[Array, "B T"] | None = None
    return_log_probs: bool = False

    def draw(
        self,
        drawn: Int[Array, "n T"],
        position: Int[Array, "*n"],
        keys: Key[Array, " n"],
        run: Run,
        given: Int[Array, " n"] | None = None,
    ) -> tuple[SampleOutput, Cache]:
        """Draws one code per row; returns their record, with fields [n] (but ``drawn_in``), and the new cache.

        Args:
          drawn: the pictures so far; only codes before ``position`` are read.
          position: number of the position that is drawn: one for all rows, or one per row.
          keys: the random key of each row's picture.
          run: runs the backbone.
          given: codes that are taken instead of draws; -1 = the draw. None = all draws. Known codes go first.
        """
        known = None if self.known is None else jnp.repeat(self.known, len(drawn) // len(self.known), axis=0)
        at, complete = jnp.broadcast_to(position, (len(drawn),)), jnp.asarray(has_context(*self.model.grid))[position]
        looked = None
        if isinstance(self.retriever, StateRetriever):
            looked, complete = run.look(), jnp.asarray(True)
            neighbors = self.retriever.search_states(run.states_of(looked[0]), drawn, at)
        elif isinstance(self.retriever, AroundRetriever):
            complete = jnp.asarray(True)  # a search without a context finds nothing, which changes nothing
            around = jnp.asarray(around_positions(*self.model.grid))[at]
            neighbors = self.retriever.search_around(around_codes(drawn, known, around))
        else:
            neighbors = self._neighbors(drawn, position)
        logits, cache = run.step(self.policy.features(self.model, neighbors, complete), looked)
        sampling = self.sampling
        guided = guide(logits, sampling.cfg_scale if self.guided else None, sampling.cfg_interval, position)
        log_p_model = truncate(guided, sampling.temperature, sampling.top_k, sampling.top_p)
        log_p = self.policy.log_probs(log_p_model, neighbors, complete)
        if self.stored is not None and sampling.max_copied_cells is not None:
            log_p = without(log_p, guided, self._forbidden(self.stored, drawn, at, known))
        code = draw(log_p, keys, position, sampling.greedy)
        if given is not None:
            code = jnp.where(given >= 0, given, code)
        if known is not None:
            code = jnp.where((own := code_at(known, position)) >= 0, own, code)
        weight = weights_of(self.policy, log_p_model, neighbors, complete)
        record = _record(code, log_p, log_p_model, neighbors, weight)
        if known is not None:
            record = jax.tree.map(lambda new, none: jnp.where(own >= 0, none, new), record, _untold(code))
        return record._replace(log_probs=log_p if self.return_log_probs else None), cache

    def _forbidden(
        self, stored: StoredImages, drawn: Int[Array, "n T"], at: Int[Array, " n"], known: Any
    ) -> Bool[Array, "n V"]:
        """Returns which codes would make a copied run too large.

        The stored images are not asked while no picture has as many different codes as a run may hold.
        """
        (rows, cells), size, most = drawn.shape, self.model.codebook_size, self.sampling.max_copied_cells
        assert most is not None
        codes = jnp.where(jnp.arange(cells)[None] < at[:, None], drawn, -1)
        codes = codes if known is None else jnp.where(known >= 0, known, codes)
        there = jnp.zeros((rows, size + 1), bool).at[jnp.arange(rows)[:, None], codes].set(True)  # -1 is the last one
        return jax.lax.cond(
            (there[:, :size].sum(1) >= most).any(),
            lambda: stored.forbidden(drawn, at, most, known),
            lambda: jnp.zeros((rows, size), bool),
        )

    def _neighbors(self, drawn: Int[Array, "n T"], position: Int[Array, "*n"]) -> Neighbors:
        """Returns the neighbours of the contexts; empty ones if nothing is searched."""
        if self.retriever is None:
            return empty_neighbors(len(drawn), 1)
        assert isinstance(self.retriever, Retriever)
        around = jnp.asarray(context_positions(*self.model.grid))[position]
        if position.ndim == 0:
            return self.retriever.search(context_codes(drawn, around))
        return self.retriever.search(jax.vmap(lambda own, at: context_codes(own[None], at)[0])(drawn, around))


def code_at(codes: Int[Array, "n T"], position: Int[Array, "*n"]) -> Int[Array, " n"]:
    """Returns the code of each row at a position: one for all rows, or one per row."""
    return jnp.take_along_axis(codes, jnp.broadcast_to(position, (len(codes),))[:, None], 1)[:, 0]


def _untold(code) -> SampleOutput:
    """Returns the record of known codes."""
    zero, none = jnp.zeros(len(code), jnp.float32), jnp.full(len(code), -1, jnp.int32)
    return SampleOutput(code, zero, zero, none, none, jnp.full(len(code), jnp.inf, jnp.float32), weight=zero)


def _record(code, log_p, log_p_model, neighbors, weight) -> SampleOutput:
    """Returns what is kept of a position; each field has the shape [n]."""
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
