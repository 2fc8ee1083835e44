"""Which images of a store searches, reports and pages may show: all that are not forgotten (``store.forgetting``)."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, UInt16

from arrag_jax.errors import UserError
from arrag_jax.json_files import read_object

FORGOTTEN = "forgotten.json"  # in the folder of a store: the names of its forgotten images
NO_CODE = 2**16 - 1  # in the grids of images that are not shown


def forgotten_in(directory: Path) -> frozenset[str]:
    """Returns the names of a store's forgotten images.

    Raises:
      UserError: if the file of names is damaged.
    """
    path = directory / FORGOTTEN
    names = read_object(path).get("names") if path.exists() else []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} is damaged: it must hold a list of names; restore it, or forget the images again")
    return frozenset(names)


class ShownImages:
    """The part of a ``Datastore`` that knows which of its images may be shown."""

    forgotten: frozenset[str]
    num_images: int

    if TYPE_CHECKING:

        @property
        def codes(self) -> UInt16[np.ndarray, "n H W"]: ...

        @property
        def sources(self) -> list[str]: ...

    @functools.cached_property
    def shown(self) -> Bool[np.ndarray, " n"] | None:
        """Which images searches, reports and pages may show; None = all."""
        if not self.forgotten:
            return None
        return np.array([name not in self.forgotten for name in self.sources], bool)

    @property
    def num_shown(self) -> int:
        """Number of images that are not forgotten."""
        return self.num_images if self.shown is None else int(self.shown.sum())

    @functools.cached_property
    def shown_codes(self) -> UInt16[np.ndarray, "n H W"]:
        """Code grids of all images; those that are not shown hold ``NO_CODE`` everywhere, which equals no code."""
        return self.codes if self.shown is None else np.where(self.shown[:, None, None], self.codes, np.uint16(NO_CODE))
