"""Which images of a store may be shown: those that are not forgotten and have one of the wanted licences."""

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from jaxtyping import Bool, UInt16

from arrag_jax.data import stated_rights
from arrag_jax.errors import UserError
from arrag_jax.json_files import read_object
from arrag_jax.store.rights import Rights, rights_in
from arrag_jax.store.shards import content_hash

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


@dataclasses.dataclass(frozen=True)
class ShownImages:
    """The part of a ``Datastore`` that knows which of its images may be shown.

    Attributes:
      forgotten: names of the images that are hidden from everything.
      licences: licences to which everything is limited; () = images of any licence, and of an unknown one.
    """

    forgotten: frozenset[str] = frozenset()
    licences: tuple[str, ...] = ()

    if TYPE_CHECKING:

        @property
        def codes(self) -> UInt16[np.ndarray, "n H W"]: ...

        @property
        def sources(self) -> list[str]: ...

        @property
        def store_fingerprint(self) -> str: ...

    @functools.cached_property
    def rights_lines(self) -> list[str]:
        """What the images' source stated of their rights, a line each; "" without it."""
        store = cast(Any, self)
        return store._lines("rights_lines") if store.settings.rights else [""] * len(self.sources)

    @functools.cached_property
    def rights(self) -> dict[str, Rights]:
        """The rights of images, by name: those that were stated when they were stored, then those recorded later."""
        directory = cast(Any, self).directory
        stated = (stated_rights.rights_in(line, f"{directory}, a line of rights,") for line in self.rights_lines)
        return stated_rights.agreed(zip(self.sources, stated, strict=True)) | rights_in(directory)

    @functools.cached_property
    def shown(self) -> Bool[np.ndarray, " n"] | None:
        """Which images searches, reports and pages may show; None = all."""
        if not self.forgotten and not self.licences:
            return None
        held = [
            name not in self.forgotten
            and (not self.licences or self.rights.get(name, Rights()).licence in self.licences)
            for name in self.sources
        ]
        return np.array(held, bool)

    @property
    def num_shown(self) -> int:
        """Number of images that may be shown."""
        return cast(Any, self).num_images if self.shown is None else int(self.shown.sum())

    @property
    def shown_fingerprint(self) -> str:
        """Identity of the patches that a search can find; that of the store if all may be shown."""
        if self.shown is None:
            return self.store_fingerprint
        return content_hash({"datastore": self.store_fingerprint, "shown": np.packbits(self.shown).tobytes().hex()})

    @functools.cached_property
    def shown_codes(self) -> UInt16[np.ndarray, "n H W"]:
        """Code grids of all images; those that are not shown hold ``NO_CODE`` everywhere, which equals no code."""
        return self.codes if self.shown is None else np.where(self.shown[:, None, None], self.codes, np.uint16(NO_CODE))
