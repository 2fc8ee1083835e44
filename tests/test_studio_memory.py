"""The studio's memory does not grow with the drawings."""

import logging
from pathlib import Path

import pytest

from helpers import studios

pytestmark = [pytest.mark.long, pytest.mark.slow]
client = pytest.importorskip("gradio_client", reason="gradio is not installed (the extra web)")

SETTINGS = (0.5, 0.01, 16, 1.5, 1.0, 0.9)  # λ, τ, K, guidance, temperature, top-p
PROMPTS = ("a cat", "two dogs", "three cats", "a dog")
BEGUN, DRAWINGS, MIB = 10, 60, 8


def resident(pid: int) -> float:
    """A process's resident memory in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def test_memory_is_flat_over_50_drawings(tmp_path_factory):
    """Visitors load every picture, rows as they come included: it is their sending that took memory once."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    held = []
    with studios.started(tmp_path_factory) as studio:
        visitor = client.Client(studio.address, verbose=False, download_files=str(tmp_path_factory.mktemp("pictures")))
        for seed in range(DRAWINGS):
            asked = visitor.submit(PROMPTS[seed % len(PROMPTS)], "caption", seed, *SETTINGS, api_name="/_draw")
            assert len(list(asked)) == 14  # "Begins …", 12 rows and the finished pictures
            held.append(resident(studio.pid))
    assert held[-1] - held[BEGUN - 1] < MIB, held
