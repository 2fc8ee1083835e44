"""One position of a draw, by every method of a config, compiled for a TPU topology from shapes alone."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from arrag_jax.command import Flag
from arrag_jax.config import DrawConfig
from arrag_jax.decode.checks import sampling_of
from arrag_jax.decode.loop import begin, lowered
from arrag_jax.decode.methods import METHODS, Kind, Search, chosen_methods
from arrag_jax.errors import UserError
from arrag_jax.mesh import abstract_state
from arrag_jax.models.checkpoint import shape_of
from arrag_jax.models.weights import set_dtypes
from arrag_jax.nn.abstract import abstract
from arrag_jax.nn.faid import FaidConfig
from arrag_jax.retrieval.shapes import dense_shapes
from arrag_jax.topology import Program, Topology, dry_run, held_bytes, open_topology

PROMPT = 64  # tokens of a prompt; they only change the size of the cache
PATCHES = Flag("with --topology: number of stored patches that the methods search", 10_000_000)


def dry_run_of_drawing(config: DrawConfig | None, names: str, topology: str, patches: int, workdir: str) -> int:
    """Compiles the programs of ``drawing_programs`` and reports on them; returns the exit code of the command.

    Args:
      names: methods, with commas; "" = the config's.
      topology: such as "v5e:2x4".

    Raises:
      UserError: if there is no config, or as ``drawing_programs``.
    """
    if config is None:
        raise UserError("missing --config (see --help)")
    opened = open_topology(topology)
    chosen = tuple(filter(None, names.split(",")))
    return dry_run(opened, drawing_programs(config, chosen, opened, patches), Path(workdir))


def drawing_programs(config: DrawConfig, names: Sequence[str], topology: Topology, patches: int) -> list[Program]:
    """Returns a program per method: one position of ``config.batch_size`` images.

    Methods are left out whose search is limited to captions or goes by hidden states.

    Args:
      names: methods; () = the config's, or all default methods.
      patches: number of stored patches.

    Raises:
      UserError: if no method is left, or the shape of a model is unknown.
    """
    chosen = chosen_methods(tuple(names) or config.methods, set(Kind))
    able = [
        name for name in chosen if METHODS[name].search in (Search.NONE, Search.STORE) and not METHODS[name].limited
    ]
    if not able:
        raise UserError(f"--topology compiles no method of {', '.join(chosen)}; give --method=plain, daid or faid")
    mesh = topology.mesh(config.mesh)
    return [_program(config, name, topology, mesh, patches) for name in able]


def _program(config: DrawConfig, name: str, topology: Topology, mesh: Mesh, patches: int) -> Program:
    method, numbers = METHODS[name], dataclasses.asdict(config.sampling)
    policy, model = method.policy(config), _model(config, method.model)
    sampling = sampling_of(model, {key: value for key, value in numbers.items() if key != "greedy"}, numbers["greedy"])
    batch = -(-config.batch_size // mesh.shape["data"]) * mesh.shape["data"]
    graph, state = nnx.split(model)
    if policy.blends:
        graph, state = _fused(graph, state)
    cond = model.condition_shapes(batch, PROMPT)
    uncond = None if config.sampling.cfg_scale is None else jax.eval_shape(model.unconditional, cond)
    start = functools.partial(begin, policy=policy, batch=batch)
    drawing = jax.eval_shape(lambda s, c, u: start(nnx.merge(graph, s), c, u), state, cond, uncond)
    drawing = drawing._replace(
        position=abstract_state(drawing.position, mesh, P()),
        hidden=abstract_state(drawing.hidden, mesh, P("data")),
        cache=abstract_state(drawing.cache, mesh, P("data")),
        out=abstract_state(drawing.out, mesh, P("data")),
    )
    keys = abstract_state(jax.eval_shape(jax.vmap(jax.random.key), jnp.zeros(batch, jnp.int32)), mesh, P("data"))
    until = abstract_state(jax.ShapeDtypeStruct((), jnp.int32), mesh, P())
    vision, search = model.config.vision, None
    if method.search is Search.STORE:
        codebook = (vision.codebook_size, vision.code_dim)
        search = dense_shapes(config.retrieval, patches, codebook, mesh, "fsdp", "data")
    state = abstract_state(state, mesh)

    arguments = graph, state, policy, search, keys, sampling, None, None, drawing, until
    held = {"parameters": held_bytes(state), "cache": held_bytes(drawing.cache), "store": held_bytes(search)}
    return Program(
        f"a position of {batch} images by {name} on {topology.name}",
        functools.partial(lowered, *arguments, mesh=mesh),
        held,
    )


def _model(config: DrawConfig, kind: Kind) -> Any:
    """Returns the model of a kind with shapes in place of arrays; blenders are the default ones if no folder tells."""
    own = {Kind.LORA: config.lora_model, Kind.FAID: config.faid_model}
    place = own.get(kind) or config.model
    family, shape = shape_of(place)
    if kind is Kind.FAID and not shape.blended_neighbors:
        shape = dataclasses.replace(shape, faid=FaidConfig())
    model: Any = abstract(family.kind, config=shape)
    set_dtypes(model, config.dtype, next(iter(family.layouts.values())).exact)
    if config.int8:
        model.language_model.hold_in_int8()
    return model


def _fused(graph: Any, state: Any) -> tuple[Any, Any]:
    """Returns the graph and the shapes of the model with fused blenders."""
    graphs: list[Any] = []

    def fused(state: Any) -> Any:
        graph_of_fused, made = nnx.split(nnx.merge(graph, state).fused())
        graphs.append(graph_of_fused)
        return made

    shapes = jax.eval_shape(fused, state)
    return graphs[0], shapes
