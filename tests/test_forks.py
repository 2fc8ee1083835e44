"""A process that was forked after JAX was used is refused, and does not hang."""

import os
import signal
import warnings

import numpy as np
import pytest

from arrag_jax.decode.loop import sample
from arrag_jax.errors import UserError
from helpers import tiny


@pytest.mark.slow
def test_a_forked_child_is_refused_and_does_not_hang():
    model, (ids, mask) = tiny.janus(), tiny.prompts((4, 3))
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jax warns of the fork
        child = os.fork()
    if not child:
        signal.alarm(60)
        for work in (
            lambda: sample(model, ids, prompt_mask=mask),
            lambda: model.score(ids, np.zeros((2, 16), int), prompt_mask=mask),
        ):
            try:
                work()
            except UserError as error:
                os.write(writing, f"{error}\n".encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as said:
        lines = said.read().splitlines()
    assert os.waitpid(child, 0)[1] == 0
    assert len(lines) == 2 and all("spawn" in line for line in lines)
    sample(model, ids, prompt_mask=mask)  # the parent goes on
