"""The methods that ``generate`` and ``eval`` draw with: one table from a name to a model, a policy and a search."""

import dataclasses
import enum
from collections.abc import Callable

from arrag_jax.config import DaidConfig, DrawConfig
from arrag_jax.decode.policies import Daid, Faid, Plain
from arrag_jax.errors import UserError
from arrag_jax.interfaces import DecodePolicy


class Kind(enum.Enum):
    """The models that a ``DrawConfig`` names."""

    BASE = "model"  # the value is the config's key
    LORA = "lora_model"
    FAID = "faid_model"


class Search(enum.Enum):
    """Where a method looks for neighbours."""

    NONE = enum.auto()
    STORE = enum.auto()  # in the whole store
    CAPTIONS = enum.auto()  # in the stored images whose captions are nearest to the prompt


@dataclasses.dataclass(frozen=True)
class Method:
    """How a method draws.

    Attributes:
      model: which model it needs.
      policy: returns its decode policy under a config.
      search: where it looks for neighbours.
      images: returns how many images ``Search.CAPTIONS`` is limited to; None with another search.
      by_default: whether it is drawn where no method is asked for.
    """

    model: Kind
    policy: Callable[[DrawConfig], DecodePolicy]
    search: Search = Search.NONE
    images: Callable[[DrawConfig], int] | None = None
    by_default: bool = True

    @property
    def limited(self) -> bool:
        """Whether the search is limited to images that the prompt's words choose."""
        return self.search is Search.CAPTIONS


def _daid(config: DaidConfig) -> Daid:
    return Daid(**dataclasses.asdict(config))


def _caption_daid(config: DrawConfig) -> Daid:
    return _daid(config.caption.daid)


BASELINE = "plain"  # what the other methods are compared with
# In the order in which they are drawn. Characters of a name: a to z and "+", because it is part of file names.
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
    """Returns the methods of these names in the order of ``METHODS``.

    Args:
      names: what is asked for; () = all that are drawn by default.
      kinds: the models that there are.

    Raises:
      UserError: a name that is unknown, or a method whose model there is not.
    """
    able = [name for name, method in METHODS.items() if method.model in kinds]
    for name in names:
        if name not in METHODS:
            raise UserError(f"--method={name!r} is unknown; choose one of {', '.join(METHODS)}")
        if name not in able:
            mend = f"give config.{METHODS[name].model.value}"
            raise UserError(f"--method={name!r} is not what these models can do: {', '.join(able)}; {mend}")
    return tuple(name for name in able if (name in names if names else METHODS[name].by_default))
