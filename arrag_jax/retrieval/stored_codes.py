"""What drawing uses of a store beside a search: guesses for windows, and the guard against copies."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Integer

from arrag_jax.ops.remote import Remote
from arrag_jax.retrieval.guard import CopyIndex
from arrag_jax.retrieval.guesses import SeenContexts


class _Host:
    """The code grids of M images on the host, with tables that are made when they are first needed."""

    def __init__(self, codes: Integer[np.ndarray, "M H W"], codebook_size: int):
        self.codes, self.size = codes, codebook_size
        self.guards: dict[int, CopyIndex] = {}

    @functools.cached_property
    def seen(self) -> SeenContexts:
        return SeenContexts(self.codes, self.size)

    def guesses(self, *arrays: np.ndarray) -> tuple[np.ndarray]:
        return (self.seen.guesses(*arrays),)

    def forbidden(
        self, drawn: np.ndarray, position: np.ndarray, most: np.ndarray, *known: np.ndarray
    ) -> tuple[np.ndarray]:
        number = int(most.reshape(-1)[0])
        if number not in self.guards:
            self.guards[number] = CopyIndex(self.codes, self.size, number)
        return (self.guards[number].forbidden(drawn, position, *known),)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class StoredCodes:
    """An ``interfaces.StoredImages`` on the host; make one with ``of``.

    Attributes:
      host: holds the code grids.
      size: V.
    """

    host: Any
    size: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, codes: Integer[np.ndarray, "M H W"], codebook_size: int) -> "StoredCodes":
        """Returns the images with these code grids, which must be those of the model's grid."""
        return cls(Remote(_Host(codes, codebook_size)), codebook_size)

    def guesses(
        self, codes: Int[Array, "B T"], final: Int[Array, " B"], known: Int[Array, " B"], end: Int[Array, " B"]
    ) -> Int[Array, "B T"]:
        """Returns the codes with guesses from ``final`` to ``end``, as ``interfaces.Guess`` does."""
        return self.host.call("guesses", (jax.ShapeDtypeStruct(codes.shape, jnp.int32),), codes, final, known, end)[0]

    def forbidden(
        self, drawn: Int[Array, "n T"], position: Int[Array, " n"], most: int, known: Int[Array, "n T"] | None = None
    ) -> Bool[Array, "n V"]:
        """Returns which codes would make a copied run of more than ``most`` different codes at the positions."""
        kind, given = jax.ShapeDtypeStruct((len(drawn), self.size), jnp.bool_), () if known is None else (known,)
        return self.host.call("forbidden", (kind,), drawn, position, jnp.int32(most), *given)[0]
