"""The tokenizer's encoder, compiled for a TPU topology from the shapes that a config names."""

import jax
import jax.numpy as jnp
from flax import nnx

from arrag_jax.config import DatastoreConfig
from arrag_jax.mesh import abstract_state
from arrag_jax.models.checkpoint import tokenizer_shapes_of
from arrag_jax.store.images import encode_compiled
from arrag_jax.topology import Program, Topology, held_bytes


def encoding_program(config: DatastoreConfig, topology: Topology) -> Program:
    """Returns the program that encodes a batch of images on one chip; chips encode batches of their own."""
    mesh, model = topology.one_chip(), tokenizer_shapes_of(config.model)
    graph, state = nnx.split(model)
    state = abstract_state(state, mesh)
    images = jax.ShapeDtypeStruct((config.batch_size, *model.image_size, 3), jnp.float32)
    return Program(
        f"encoding {config.batch_size} images on a chip of {topology.name}",
        lambda: encode_compiled.lower(graph, state, abstract_state(images, mesh)),
        {"parameters": held_bytes(state)},
    )
