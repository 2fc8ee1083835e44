"""The tasks that can be trained: from a config's ``task`` to its task object."""

from typing import Any

from arrag_jax.config import TrainConfig
from arrag_jax.parsing import parse
from arrag_jax.training.faid import FaidOptions, FaidStep, FaidTask
from arrag_jax.training.prior import PriorOptions, PriorStep, PriorTask
from arrag_jax.training.task import Task
from arrag_jax.training.tokenizer import TokenizerOptions, TokenizerStep, TokenizerTask

TASKS = {
    "tokenizer": (TokenizerTask, TokenizerOptions),
    "prior": (PriorTask, PriorOptions),
    "faid": (FaidTask, FaidOptions),
}
STEPS: dict[str, Any] = {"tokenizer": TokenizerStep, "prior": PriorStep, "faid": FaidStep}  # without any data


def make_task(config: TrainConfig) -> Task:
    """Returns the task that a config names.

    Raises:
      UserError: if the task does not have an option, or if its value is invalid.
    """
    task, options = TASKS[config.task]
    return task(config, parse(options, config.options, "config.options"))
