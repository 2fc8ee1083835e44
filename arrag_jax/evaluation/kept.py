"""Results that an interrupted ``eval`` has finished; the same command continues after them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arrag_jax.files import write_json
from arrag_jax.json_files import read_json

RECORD = ".measured.json"


class Kept:
    """The finished results in a folder, by all that they depend on."""

    def __init__(self, folder: Path | None):
        """
        Args:
          folder: None = nothing is kept.
        """
        self._path = folder and folder / RECORD
        self._rows: dict[str, Any] = read_json(self._path) if self._path and self._path.exists() else {}

    def result(self, key: Any, make: Callable[[], Any]) -> Any:
        """Returns the result of this key; it is made and kept if there is none.

        Args:
          key: JSON values, all that the result depends on.
          make: returns JSON values.
        """
        name = json.dumps(key, sort_keys=True)
        if name not in self._rows:
            self._rows[name] = make()
            if self._path:
                write_json(self._path, self._rows)
        return self._rows[name]

    def forget(self) -> None:
        """Removes the file, because the whole measurement is complete."""
        if self._path:
            self._path.unlink(missing_ok=True)
