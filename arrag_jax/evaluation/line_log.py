"""A file of JSON lines that is filled in order, and continued after an interruption to the same bytes."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from arrag_jax import progress, signals
from arrag_jax.files import sha256_of, write_errors

IMAGE = "sha256"  # key of an image's hash in an entry
CHUNK = 16  # entries that are computed at once


def image_hash(path: Path) -> str:
    """Returns the identity of an image file, 16 hex digits."""
    return sha256_of(path)[:16]


def continued(
    path: Path,
    header: Mapping[str, Any],
    keys: Sequence[Mapping[str, Any]],
    compute: Callable[[list[int]], Iterable[Mapping[str, Any]]],
    what: str,
) -> list[dict[str, Any]]:
    """Returns one entry per key: the key together with what ``compute`` gives for it.

    The first line of the file is the header, each further line one entry, in the order of the keys. Lines that stand
    there already are read instead of computed, up to the first that has another key. With another header, everything is
    computed again. A line that a killed run left unfinished is dropped.

    Args:
      compute: from the numbers of some keys to one mapping each.
      what: name of the work, for the progress bar and the line that a signal prints.

    Raises:
      UserError: if the file cannot be written.
      signals.Stop: after a chunk, if a signal has arrived.
    """
    head = json.dumps(header, ensure_ascii=False)
    done, size = _read(path, head, keys)
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            file.truncate(size)
            if not size:
                file.write(f"{head}\n".encode())
            with (
                progress.bar(total=len(keys), initial=len(done), desc=what, unit="image") as bar,
                signals.held(what) as point,
            ):
                for start in range(len(done), len(keys), CHUNK):
                    numbers = list(range(start, min(start + CHUNK, len(keys))))
                    for number, found in zip(numbers, compute(numbers), strict=True):
                        done.append({**keys[number], **found})
                        file.write(f"{json.dumps(done[-1], ensure_ascii=False)}\n".encode())
                    file.flush()
                    bar.update(len(numbers))
                    point.check()
    return done


def _read(path: Path, head: str, keys: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Returns the entries that can be kept, and the bytes of the file that hold them and the header."""
    if not path.exists():
        return [], 0
    done: list[dict[str, Any]] = []
    with open(path, "rb") as file:
        size = len(first) if (first := file.readline()) == f"{head}\n".encode() else 0
        for key, line in zip(keys if size else (), file, strict=False):
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                break
            if not isinstance(entry, dict) or any(entry.get(name) != value for name, value in key.items()):
                break
            done.append(entry)
            size += len(line)
    return done, size
