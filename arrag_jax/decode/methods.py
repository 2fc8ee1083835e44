"""The sampling methods of ``generate`` and ``eval``: one table from a name to a model, a policy and a search."""

import dataclasses
import enum
from collections.abc import Callable

from arrag_jax.config import DaidConfig, DrawConfig
from arrag_jax.decode.policies import Daid, Faid, Plain
from arrag_jax.errors import UserError
from arrag_jax.interfaces import DecodePolicy


class Kind(enum.Enum):
    """A model that a ``DrawConfig`` names."""

    BASE = "model"  # the value is the config's key
    LORA = "lora_model"
    FAID = "faid_model"


class Search(enum.Enum):
    """The set of stored images in which a method searches for neighbours."""

    NONE = enum.auto()
    STORE = enum.auto()  # the whole store
    CAPTIONS = enum.auto()  # the stored images whose captions are nearest to the prompt


@dataclasses.dataclass(frozen=True)
class Method:
    """How a method samples images.

    Attributes:
      model: the model that the method needs.
      policy: returns the method's decode policy for a config.
      search: where the method searches for neighbours.
      images: returns the number of images to which ``Search.CAPTIONS`` is limited; None for another search.
      by_default: whether the method is used when no method is requested.
    """

    model: Kind
    policy: Callable[[DrawConfig], DecodePolicy]
    search: Search = Search.NONE
    images: Callable[[DrawConfig], int] | None = None
    by_default: bool = True

    @property
    def limited(self) -> bool:
        """Whether the search is limited to the images that the prompt selects by their captions."""
        return self.search is Search.CAPTIONS


def _daid(config: DaidConfig) -> Daid:
    return Daid(**dataclasses.asdict(config))


def _caption_daid(config: DrawConfig) -> Daid:
    return _daid(config.caption.daid)


BASELINE = "plain"  # the method with which the others are compared
# The order is the order of sampling. A name uses only a to z and "+", because it becomes part of file names.
METHODS = {
    BASELINE: Method(Kind.BASE, lambda c: Plain()),
    "static": Method(Kind.BASE, _caption_daid, Search.CAPTIONS, lambda c: c.caption.static_images, by_default=False),
    "daid": Method(Kind.BASE, lambda c: _daid(c.daid), Search.STORE),
    "caption": Method(Kind.BASE, _caption_daid, Search.CAPTIONS, lambda c: c.caption.images, by_default=False),
    "lora": Method(Kind.LORA, lambda c: Plain()),
    "faid": Method(Kind.FAID, lambda c: Faid(), Search.STORE),
    "faid+daid": Method(Kind.FAID, lambda c: Faid(_daid(c.daid)), Search.STORE),
}


def chosen_methods(names: tuple[str, ...], kinds: set[Kind]) -> tuple[str, ...]:
    """Returns the names of the requested methods in the order of ``METHODS``.

    Args:
      names: the requested names; () = all methods that are used by default.
      kinds: the models that are available.

    Raises:
      UserError: if a name is unknown, or if the model of a method is not available.
    """
    able = [name for name, method in METHODS.items() if method.model in kinds]
    for name in names:
        if name not in METHODS:
            raise UserError(f"--method={name!r} is unknown; choose one of {', '.join(METHODS)}")
        if name not in able:
            mend = f"give config.{METHODS[name].model.value}"
            raise UserError(f"--method={name!r} needs another model: {mend}, or choose one of {', '.join(able)}")
    return tuple(name for name in able if (name in names if names else METHODS[name].by_default))
