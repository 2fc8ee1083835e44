"""AR-RAG in JAX: retrieval inside autoregressive image generation (arXiv 2506.06962).

The API in two names: ``load_model(directory)`` gives a model with ``score``, ``encode_images`` and ``decode_codes``;
``sample(model, prompt_ids, …)`` draws with it.
"""

import importlib
from typing import Any

_API = {"load_model": "arrag_jax.models.checkpoint", "sample": "arrag_jax.decode.loop"}
__all__ = list(_API)


def __getattr__(name: str) -> Any:
    # On first use, so that what needs no model (the scenes, the configs) imports in a moment.
    if name in _API:
        return getattr(importlib.import_module(_API[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
