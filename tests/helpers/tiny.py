"""Tiny models and stores that several tests share."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from arrag_jax.decode.loop import SampleOutput
from arrag_jax.models.janus import PARTS, Janus
from arrag_jax.models.presets import JanusConfig
from arrag_jax.nn.abstract import abstract
from arrag_jax.nn.layer import LlamaConfig
from arrag_jax.nn.vq import VQConfig
from arrag_jax.ops import grid
from arrag_jax.retrieval.dense import DenseRetriever

CONFIG = JanusConfig(
    language=LlamaConfig(vocab_size=12, width=16, layers=2, heads=4, kv_heads=2, mlp=24),
    vision=VQConfig(
        codebook_size=9, channels=4, multipliers=(1, 2), z_channels=8, res_blocks=1, norm_scope="pixel", middle=False
    ),
    grid=(4, 5),
    head_width=16,
    pad_id=1,
)


def janus(seed: int = 0, config: JanusConfig = CONFIG, parts: tuple[str, ...] = PARTS) -> Janus:
    """A random Janus whose logits differ enough between codes for draws to mean something.

    Filled by numpy: to compile the real initialisers takes longer than most tests.
    """
    model = abstract(Janus, config=config, parts=parts)
    fill(model, seed)
    return model


def fill(model: nnx.Module, seed: int) -> None:
    """Gives every variable of an abstract model random values of a sensible size."""
    rng = np.random.default_rng(seed)
    for path, value in nnx.to_flat_state(nnx.state(model)):
        shape, name = value.shape, path[-1]
        fan_in = {"kernel": np.prod(shape[:-1]) ** -0.5, "weight": shape[-1] ** -0.5}
        scale = {**fan_in, "bias": 0.1, "scale": 0.2, "norm_scale": 0.2}.get(name, 1.0)
        scale *= 4.0 if path[:3] == ("gen_head", "layers", 1) else 1.0
        value.set_value(jnp.asarray(scale * rng.normal(size=shape) + name.endswith("scale"), jnp.float32))


def prompts(lengths: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random prompts of these many tokens, padded on the left: ids and mask."""
    rng, width = np.random.default_rng(seed), max(lengths)
    ids = rng.integers(2, CONFIG.language.vocab_size, (len(lengths), width)).astype(np.int32)
    mask = np.arange(width)[None] >= width - np.array(lengths)[:, None]
    return np.where(mask, ids, CONFIG.pad_id).astype(np.int32), mask


def store(model: Janus, k: int = 6, images: int = 30, seed: int = 0) -> DenseRetriever:
    """An exact search over random code grids."""
    height, width = model.grid
    codes = np.random.default_rng(seed).integers(0, model.codebook_size, (images, height, width))
    codebook = np.asarray(model.codebook)
    keys = codebook[grid.contexts_of_grids(codes)].reshape(-1, 4 * codebook.shape[1])
    return DenseRetriever.create(keys, grid.next_codes_of_grids(codes).reshape(-1), codebook, k)


def untied(model: Janus, k: int = 6, kind: type = DenseRetriever):
    """A search of a kind over keys of random latents: no ties, so that every search and batch must agree."""
    rng, codebook = np.random.default_rng(0), np.asarray(model.codebook)
    parts = rng.normal(size=(400, 4, codebook.shape[1]))
    keys = (parts / np.linalg.norm(parts, axis=-1, keepdims=True)).reshape(400, -1).astype(np.float32)
    return kind.create(keys, rng.integers(0, 9, 400).astype(np.int32), codebook, k)


def assert_retrieved(drawn: SampleOutput, model: Janus, retriever: DenseRetriever) -> None:
    """Every code drawn in a cell that has a context is one of those retrieved for it."""
    inside, source = grid.has_context(*model.grid), np.asarray(drawn.source)
    assert np.all(source[:, inside] >= 0)
    assert np.all(source[:, ~inside] == -1)  # boundary cells never retrieve
    np.testing.assert_array_equal(np.asarray(retriever.codes)[source[:, inside]], np.asarray(drawn.codes)[:, inside])
