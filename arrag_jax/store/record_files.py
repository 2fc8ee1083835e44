"""Reads and writes the files of arrays in folders of shards; a file that the manifest contradicts raises ValueError."""

import contextlib
import hashlib
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from arrag_jax.files import atomic_write, sha256_of
from arrag_jax.store.shards import require_count, require_digest


def read_array(path: Path, name: str, shape: tuple[int, ...], facts: dict[str, Any]) -> np.ndarray:
    """Returns the float32 array ``name`` of an ``.npz`` file that is not compressed.

    Args:
      facts: the manifest's facts about the file.
    """
    content = path.read_bytes()
    if 4 * math.prod(shape) > len(content):  # checked before the array is allocated
        raise ValueError(f"it cannot hold {shape[0]} rows of {shape[1]} numbers")
    require_digest(hashlib.sha256(content).hexdigest(), facts)
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        found = file[name]
    if found.shape != shape or found.dtype != np.float32 or not np.isfinite(found).all():
        raise ValueError(f"it holds {found.dtype} {found.shape}, not finite float32 {shape}")
    return found


def write_array(path: Path, name: str, array: np.ndarray) -> None:
    """Writes the file that ``read_array`` reads, atomically."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, **{name: np.asarray(array, np.float32)})


def read_records(
    path: Path, facts: dict[str, Any], dtype: str, shape: tuple[int, ...], wanted: slice, check: bool
) -> np.ndarray:
    """Returns some records of an ArrayRecord file as an array [n, *shape].

    Args:
      facts: the manifest's facts about the file.
      dtype, shape: of one record.
      wanted: numbers of the records.
      check: also check the file's hash if all records are wanted. The reader checks the hash of each record, but a file
        of the same size may have replaced this one.
    """
    number = wanted.stop - wanted.start
    with contextlib.closing(ArrayRecordReader(str(path))) as reader:
        require_count(range(reader.num_records()), facts["images"])
        first = reader.read(wanted.start, wanted.start + 1)[0]
        if len(first) != math.prod(shape) * np.dtype(dtype).itemsize:
            raise ValueError(f"its records have {len(first)} bytes, not those of {list(shape)} numbers")
        if check and number == facts["images"]:
            require_digest(sha256_of(path), facts)
        return np.frombuffer(b"".join(reader.read(wanted.start, wanted.stop)), dtype).reshape(number, *shape)
