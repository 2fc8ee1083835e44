"""AR-RAG in JAX: retrieval inside autoregressive image generation (arXiv 2506.06962).

The public API:

  ``load_model(directory)`` returns a model with ``score``, ``encode_images`` and ``decode_codes``.
  ``PromptTokenizer`` turns prompts into the condition that the model draws under.
  ``load_retriever`` opens a datastore and returns its search.
  ``Daid`` and ``Faid`` are the policies: the ways in which retrieval changes a draw.
  ``sample(model, condition, …)`` draws images, optionally with a policy and a search.
  ``sample_stream(model, condition, …)`` does the same and yields each row of the code grids when it is drawn.
"""

import importlib
import sys
from typing import Any

__version__ = "0.1.0"  # the only place that defines the version

_API = {
    "Daid": "arrag_jax.decode.policies",
    "Faid": "arrag_jax.decode.policies",
    "PromptTokenizer": "arrag_jax.models.text",
    "load_model": "arrag_jax.models.checkpoint",
    "load_retriever": "arrag_jax.retrieval.load",
    "sample": "arrag_jax.decode.loop",
    "sample_stream": "arrag_jax.decode.stream",
}
__all__ = list(_API)


def __getattr__(name: str) -> Any:
    # Imports on first use, so that code without a model, such as the scenes and configs, imports quickly.
    if name in _API:
        return getattr(importlib.import_module(_API[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


importlib.import_module("arrag_jax.forks")  # records forks from here on

# If this is a command, its signal handlers are installed before its slow imports.
if sys.argv[:1] == ["-m"] and any(word.startswith("arrag_jax.") for word in sys.orig_argv):
    importlib.import_module("arrag_jax.errors").start_command()
