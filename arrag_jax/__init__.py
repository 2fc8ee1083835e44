"""AR-RAG in JAX: retrieval inside autoregressive image generation (arXiv 2506.06962).

The API: ``load_model(directory)`` gives a model with ``score``, ``encode_images`` and ``decode_codes``.
``PromptTokenizer`` turns prompts into the condition that it draws under. ``sample(model, condition, …)`` draws, with
the policy ``Daid`` or ``Faid`` and the search that ``load_retriever`` opens.
"""

import importlib
import sys
from typing import Any

_API = {
    "Daid": "arrag_jax.decode.policies",
    "Faid": "arrag_jax.decode.policies",
    "PromptTokenizer": "arrag_jax.models.text",
    "load_model": "arrag_jax.models.checkpoint",
    "load_retriever": "arrag_jax.retrieval.load",
    "sample": "arrag_jax.decode.loop",
}
__all__ = list(_API)


def __getattr__(name: str) -> Any:
    # On first use, so that what needs no model (the scenes, the configs) imports in a moment.
    if name in _API:
        return getattr(importlib.import_module(_API[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _excepthook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, trace)
    print("error: interrupted", file=sys.stderr)
    sys.exit(130)


importlib.import_module("arrag_jax.forks")  # which notes forks from here on

# In a command: before its imports, which take seconds.
if sys.argv[:1] == ["-m"] and any(word.startswith("arrag_jax.") for word in sys.orig_argv):
    importlib.import_module("arrag_jax.signals").start_command()
    sys.excepthook = _excepthook  # a library may take the signals while it is imported
