"""The common part of models that generate codes with a Llama decoder: steps, scores, FAiD's blenders and LoRA."""

import dataclasses
import hashlib
import math
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from arrag_jax.errors import UserError
from arrag_jax.forks import require_own_process
from arrag_jax.interfaces import ArrayLike, Cache, Condition
from arrag_jax.mesh import fetched
from arrag_jax.models.vq_images import VQImages, check_ids
from arrag_jax.models.weights import parameters
from arrag_jax.nn.faid import FaidConfig
from arrag_jax.nn.lora import LoraConfig
from arrag_jax.nn.transformer import Llama
from arrag_jax.nn.vq import VQTokenizer

PROBED = 4096  # numbers of each parameter that a fingerprint covers
Model = TypeVar("Model", bound="LlamaBackbone")


class LlamaBackbone(VQImages):
    """Implements ``interfaces.TunableModel`` with a ``Llama``.

    A subclass defines ``check_condition``, ``unconditional``, ``prefill``, ``embed_codes``, ``forward_states``,
    ``part_names`` and these attributes.

    Attributes:
      config: a ``models.shape.ModelShape``.
      language_model: the decoder.
      gen_vision_model: the image tokenizer.
      gen_head: maps the decoder's hidden states to logits of codes.
    """

    config: Any
    language_model: Llama
    gen_vision_model: VQTokenizer
    gen_head: Any

    if TYPE_CHECKING:

        def __init__(self, config: Any, rngs: nnx.Rngs, parts: tuple[str, ...] = ...): ...

        def condition_shapes(self, batch: int, length: int) -> Any: ...

        def check_condition(self, condition: ArrayLike, mask: ArrayLike = None) -> Condition: ...

        def unconditional(self, condition: Condition) -> Condition: ...

        def prefill(self, condition: Condition, blended_rows: int) -> tuple[Float[Array, "R D"], Cache]: ...

        def embed_codes(self, codes: Int[Array, "*dims"]) -> Float[Array, "*dims D"]: ...

        def forward_states(
            self,
            condition: Condition,
            codes: Int[Array, "B T"],
            neighbors: Int[Array, "B T K"] | None = None,
            conditional: Bool[Array, " B"] | None = None,
            rngs: nnx.Rngs | None = None,
        ) -> tuple[Float[Array, "B T D"], Float[Array, " blenders"]]: ...

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the code grid."""
        return self.config.grid

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image of this grid in pixels."""
        return self.config.image_size

    @property
    def backbone_fingerprint(self) -> str:
        """Identity of everything that determines the hidden states: sixteen hex digits.

        It covers ``PROBED`` evenly spaced numbers of each parameter outside the tokenizer, rounded to bfloat16, so that
        models that differ only in their dtype have the same fingerprint.
        """
        digest = hashlib.sha256()
        for name, value in sorted(parameters(self).items()):
            if not name.startswith("gen_vision_model."):
                flat = value[...].reshape(-1)
                probed = flat[np.linspace(0, flat.size - 1, min(PROBED, flat.size)).astype(np.int64)]
                digest.update(f"{name} {value.shape}".encode())
                digest.update(fetched(probed.astype(jnp.bfloat16)).tobytes())
        return digest.hexdigest()[:16]

    @property
    def blended_neighbors(self) -> int:
        """K of FAiD's blenders; 0 = the model has none."""
        return self.config.blended_neighbors

    def retrieved_features(self, neighbors: Int[Array, "*dims K"]) -> Float[Array, "*dims K D"]:
        """Returns the input of FAiD's first blender: embeddings of retrieved codes, zeros for absent codes (-1)."""
        return jnp.where(neighbors[..., None] >= 0, self.embed_codes(jnp.maximum(neighbors, 0)), 0)

    def with_grid(self: Model, grid: ArrayLike) -> Model:
        """Returns the same model for another grid (height, width); the two models share every parameter.

        Raises:
          UserError: if ``grid`` is not two whole numbers from 1 to 1024.
        """
        other = type(self)(self.config.with_grid(grid), nnx.Rngs(0), parts=())
        for name in self.part_names():
            setattr(other, name, nnx.data(getattr(self, name)))
        return other

    def part_names(self) -> tuple[str, ...]:
        """Returns the names of the attributes that hold the parts of the model."""
        raise NotImplementedError

    def fused(self: Model) -> Model:
        """Returns a copy for generation with FAiD whose blenders' kernels are fused; it shares all other arrays."""
        copy = nnx.merge(*nnx.split(self))
        copy.language_model = nnx.data(self.language_model.fused())
        return copy

    def add_adapters(
        self, lora: LoraConfig, faid: FaidConfig | None, rngs: nnx.Rngs, start_silent: bool = False
    ) -> None:
        """Adds an untrained LoRA to the language model, and untrained blenders unless it has blenders, in place.

        Args:
          lora: shape of the LoRA.
          faid: shape of the blenders; None = add no blenders.
          rngs: for the initial values.
          start_silent: new blenders are initialised so that they do not change the model's output.

        Raises:
          UserError: if the model already has blenders of another shape.
        """
        if faid is not None and self.config.faid is None:
            self.config = dataclasses.replace(self.config, faid=faid)
            self.language_model.add_blenders(faid, rngs, start_silent)
        elif faid is not None and self.config.faid != faid:
            raise UserError(f"the model has blenders already, {self.config.faid}, which are not the config's {faid}")
        for layer in self.language_model.layers:
            layer.attention.add_lora(lora, rngs)

    def adapters(self, blenders: bool = True) -> list[nnx.Module]:
        """Returns the modules that fine-tuning trains: the head, every LoRA and, if ``blenders``, every blender."""
        parts: list[nnx.Module | None] = [self.gen_head]
        for layer in self.language_model.layers:
            parts += [layer.attention.q_lora, layer.attention.v_lora, layer.blender if blenders else None]
        return [part for part in parts if part is not None]

    def merge_lora(self) -> None:
        """Merges every LoRA into the weights that it corrects, in place."""
        for layer in self.language_model.layers:
            layer.attention.merge_lora()

    def step(
        self,
        hidden: Float[Array, "R D"],
        cache: Cache,
        position: Int[Array, ""],
        features: Float[Array, "B K D"] | None = None,
    ) -> tuple[Float[Array, "R V"], Cache]:
        """Returns the logits of the code at ``position`` and the updated cache; arguments as in ``step_state``."""
        state, cache = self.step_state(hidden, cache, position, features)
        return self.logits(state), cache

    def step_state(
        self,
        hidden: Float[Array, "R D"],
        cache: Cache,
        position: Int[Array, ""],
        features: Float[Array, "B K D"] | None = None,
    ) -> tuple[Float[Array, "R D"], Cache]:
        """Returns the state from which the code at ``position`` is predicted, and the updated cache.

        Args:
          hidden: embedding of the token before ``position``.
          features: features of the neighbors for FAiD's blenders.
        """
        return self.language_model.step(hidden, cache, position, self.grid, features)

    def step_states(
        self,
        hidden: Float[Array, "R S D"],
        cache: Cache,
        first: Int[Array, "*R"],
        features: Float[Array, "B S K D"] | None = None,
    ) -> tuple[Float[Array, "R S D"], Cache]:
        """Returns the states that predict S positions from ``first`` on, and the cache; see ``Llama.window``."""
        return self.language_model.window(hidden, cache, first, self.grid, features)

    def logits(self, state: Float[Array, "*dims D"]) -> Float[Array, "*dims V"]:
        """Returns the float32 logits of codes that states predict."""
        return self.gen_head(state).astype(jnp.float32)

    def states(
        self,
        condition: Condition,
        codes: Int[Array, "B T"],
        neighbors: Int[Array, "B T K"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the states of all positions at once; state t predicts ``codes[:, t]``.

        Args:
          neighbors: retrieved codes, -1 where absent; None = FAiD's blenders, if any, are skipped.
        """
        return self.forward_states(condition, codes, neighbors)[0]

    def teacher_forced(
        self,
        condition: Condition,
        codes: Int[Array, "B T"],
        neighbors: Int[Array, "B T K"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Returns the logits of the ``states``."""
        return self.logits(self.states(condition, codes, neighbors))

    def forward(
        self,
        condition: Condition,
        codes: Int[Array, "B T"],
        neighbors: Int[Array, "B T K"] | None = None,
        conditional: Bool[Array, " B"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "B T V"], Float[Array, " blenders"]]:
        """Returns the logits of the states of ``forward_states``, and each blender's mean gate."""
        states, gates = self.forward_states(condition, codes, neighbors, conditional, rngs)
        return self.logits(states), gates

    def continued(
        self,
        condition: Float[Array, "B L D"],
        codes: Int[Array, "B T"],
        positions: Int[Array, "B S"],
        filled: Bool[Array, "B S"],
        neighbors: Int[Array, "B T K"] | None,
        conditional: Bool[Array, " B"] | None,
        rngs: nnx.Rngs | None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, " blenders"]]:
        """Returns the states of codes after an embedded condition, and each blender's mean gate.

        Args:
          positions: rotary positions of the S = L + T - 1 tokens.
          filled: True for tokens that later tokens may attend to.
          codes, neighbors, conditional, rngs: as in ``forward_states``.
        """
        x = jnp.concatenate([condition, self.embed_codes(codes[:, :-1])], axis=1)
        features = None if neighbors is None else self.retrieved_features(neighbors)
        hidden, gates = self.language_model.forward(x, positions, filled, self.grid, features, conditional, rngs)
        return hidden[:, -codes.shape[1] :], gates

    def score(
        self,
        condition: ArrayLike,
        codes: ArrayLike,
        neighbor_codes: ArrayLike = None,
        prompt_mask: ArrayLike = None,
        grid: ArrayLike = None,
    ) -> Float[Array, "B T V"]:
        """Returns float32 logits [B, T, V] of given codes; row t predicts ``codes[:, t]``.

        Args:
          condition: as for ``check_condition``.
          codes: int [B, T].
          neighbor_codes: int [B, T, K], retrieved codes for FAiD's blenders, with any K. The blenders average over all
            K slots, including empty ones (-1). None = a FAiD model gives the scores of its base model.
          prompt_mask: 0/1 [B, L], 1 = a real token, pads on either side; None = no pads.
          grid: height and width of the grid of the T codes, which only blenders and rotary positions on the grid use;
            None = the model's own grid if it has T positions, else a square.

        Raises:
          UserError: if a shape or an id does not fit the model.
        """
        require_own_process()
        condition = self.check_condition(condition, prompt_mask)
        codes, batch = np.asarray(codes), len(jax.tree.leaves(condition)[0])
        if codes.ndim != 2 or len(codes) != batch:
            raise UserError(f"codes must be [B, T] with B = {batch} as the prompts, got {codes.shape}")
        check_ids("codes", codes, self.codebook_size)
        if neighbor_codes is not None:
            neighbor_codes = self._check_neighbors(neighbor_codes, codes.shape)
        model = self
        if grid is not None or neighbor_codes is not None or self.config.language.rotary == "positions":
            model = self.with_grid(self._grid_of(codes.shape[1], grid))
        codes = jnp.asarray(codes, jnp.int32)
        return _teacher_forced(*nnx.split(model), condition, codes, neighbor_codes)

    def _grid_of(self, cells: int, grid: ArrayLike) -> tuple[int, int]:
        """Returns the grid that this number of positions fills."""
        side = math.isqrt(cells)
        if grid is None:
            grid = self.grid if math.prod(self.grid) == cells else (side, side)
        grid = self.config.with_grid(grid).grid
        if math.prod(grid) != cells:
            raise UserError(
                f"{cells} codes do not fill a grid of {grid[0]} x {grid[1]}; pass the right one: grid=(H, W)"
            )
        return grid

    def _check_neighbors(self, given: ArrayLike, shape: tuple[int, int]) -> Int[Array, "B T K"]:
        given = np.asarray(given)
        if self.config.faid is None:
            raise UserError("neighbor_codes are given, but this checkpoint has no FAiD blenders")
        if given.ndim != 3 or given.shape[:2] != shape or given.shape[2] < 1:
            raise UserError(f"neighbor_codes must be [B, T, K] with K >= 1 for codes {shape}, got {given.shape}")
        check_ids("neighbor_codes", given, self.codebook_size, lowest=-1)
        return jnp.asarray(given, jnp.int32)


# Compiled once per shape. The model is passed as (graphdef, state), so its arrays are arguments, not constants.
@jax.jit(static_argnums=0)
def _teacher_forced(graph, state, condition, codes, neighbors):
    return nnx.merge(graph, state).teacher_forced(condition, codes, neighbors)
