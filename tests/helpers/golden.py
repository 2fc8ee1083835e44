"""Golden numbers of the official implementations: those committed, and the larger ones where they lie on the machine."""

from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[1] / "golden"
SHARED = Path(__file__).resolve().parents[3] / "shared"


def find(family: str, name: str) -> Path:
    """Path of a golden file or folder of a family (``dev`` or ``llamagen``); skips where it is absent."""
    places = (HERE / family / name, SHARED / "reference" / family / name)
    found = next((place for place in places if place.exists()), None)
    if found is None:
        pytest.skip(f"golden numbers are not on this machine (../shared/reference/{family}/{name})")
    return found
