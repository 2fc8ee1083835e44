"""The tasks that can be trained: from a config's ``task`` to its task object."""

from arrag_jax.config import TrainConfig
from arrag_jax.parsing import parse
from arrag_jax.training.faid import FaidOptions, FaidTask
from arrag_jax.training.loop import Task
from arrag_jax.training.prior import PriorOptions, PriorTask
from arrag_jax.training.tokenizer import TokenizerOptions, TokenizerTask

TASKS = {
    "tokenizer": (TokenizerTask, TokenizerOptions),
    "prior": (PriorTask, PriorOptions),
    "faid": (FaidTask, FaidOptions),
}


def make_task(config: TrainConfig) -> Task:
    """Returns the task that a config names.

    Raises:
      UserError: if the task does not have an option, or if its value is invalid.
    """
    task, options = TASKS[config.task]
    return task(config, parse(options, config.options, "config.options"))
