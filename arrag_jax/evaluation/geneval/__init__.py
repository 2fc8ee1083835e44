"""GenEval: whether images show the objects, numbers, colours and positions of their prompts (arXiv 2310.11513)."""

from arrag_jax.evaluation.geneval.rules import judge as judge
