"""The sampling methods of ``generate`` and ``eval``: one table from a name to a model, a policy and a search."""

import dataclasses
import enum
from collections.abc import Callable

from arrag_jax.config import DrawConfig, GateConfig, RetrievalConfig
from arrag_jax.decode.policies import Daid, Faid, Plain
from arrag_jax.errors import UserError
from arrag_jax.interfaces import DecodePolicy
from arrag_jax.ops.keys import HIDDEN


class Kind(enum.Enum):
    """A model that a ``DrawConfig`` names."""

    BASE = "model"  # the value is the config's key
    LORA = "lora_model"
    FAID = "faid_model"
    FAID_HIDDEN = "hidden.faid_model"  # its neighbours are found by the states of the base


class Search(enum.Enum):
    """Where a method searches for neighbours, and by which keys."""

    NONE = enum.auto()
    STORE = enum.auto()  # config.retrieval
    HIDDEN = enum.auto()  # config.hidden: the same store, by the backbone's states
    CUT = enum.auto()  # config.hidden: the part of the store in cut_store, by the backbone's states


@dataclasses.dataclass(frozen=True)
class Method:
    """How a method samples images.

    Attributes:
      model: the model that the method needs.
      policy: returns the method's decode policy for a config.
      search: where the method searches for neighbours.
      images: returns the number of stored images, those with the captions nearest to the prompt, that the search is
        limited to; None = it is not limited.
      gate: returns the settings of the gate of the policy's mixture; None = the mixture has no gate.
      by_default: whether the method is used when no method is requested.
    """

    model: Kind
    policy: Callable[[DrawConfig], DecodePolicy]
    search: Search = Search.NONE
    images: Callable[[DrawConfig], int] | None = None
    gate: Callable[[DrawConfig], GateConfig] | None = None
    by_default: bool = True

    @property
    def limited(self) -> bool:
        """Whether the search is limited to the images that the prompt selects by their captions."""
        return self.images is not None


BASELINE = "plain"  # the method with which the others are compared
# The order is the order of sampling. A name uses only a to z and "+", because it becomes part of file names.
METHODS = {
    BASELINE: Method(Kind.BASE, lambda c: Plain()),
    "static": Method(
        Kind.BASE, lambda c: Daid.of(c.caption.daid), Search.STORE, lambda c: c.caption.static_images, by_default=False
    ),
    "daid": Method(Kind.BASE, lambda c: Daid.of(c.daid), Search.STORE, gate=lambda c: c.daid.gate),
    "caption": Method(
        Kind.BASE, lambda c: Daid.of(c.caption.daid), Search.STORE, lambda c: c.caption.images, by_default=False
    ),
    "hidden": Method(Kind.BASE, lambda c: Daid.of(c.hidden.daid), Search.HIDDEN, by_default=False),
    "hidden+caption": Method(
        Kind.BASE, lambda c: Daid.of(c.hidden.daid), Search.HIDDEN, lambda c: c.hidden.images, by_default=False
    ),
    "gated": Method(
        Kind.BASE,
        lambda c: Daid.of(c.hidden.gated),
        Search.HIDDEN,
        gate=lambda c: c.hidden.gated.gate,
        by_default=False,
    ),
    "gated+caption": Method(
        Kind.BASE,
        lambda c: Daid.of(c.hidden.gated_caption),
        Search.HIDDEN,
        lambda c: c.hidden.images,
        lambda c: c.hidden.gated_caption.gate,
        by_default=False,
    ),
    "gated+cut": Method(
        Kind.BASE,
        lambda c: Daid.of(c.hidden.cut),
        Search.CUT,
        lambda c: c.hidden.images,
        lambda c: c.hidden.cut.gate,
        by_default=False,
    ),
    "lora": Method(Kind.LORA, lambda c: Plain()),
    "faid": Method(Kind.FAID, lambda c: Faid(), Search.STORE),
    "faid+daid": Method(Kind.FAID, lambda c: Faid(Daid.of(c.daid)), Search.STORE),
    "faid+hidden": Method(Kind.FAID_HIDDEN, lambda c: Faid(), Search.HIDDEN, by_default=False),
    "faid+gated": Method(
        Kind.FAID_HIDDEN,
        lambda c: Faid(Daid.of(c.hidden.gated)),
        Search.HIDDEN,
        gate=lambda c: c.hidden.gated.gate,
        by_default=False,
    ),
}


def search_config(config: DrawConfig, search: Search) -> RetrievalConfig:
    """Returns the settings of a search.

    Raises:
      UserError: if the search needs a store that the config does not name.
    """
    if search not in (Search.HIDDEN, Search.CUT):
        return config.retrieval
    own = config.hidden
    store = own.cut_store if search is Search.CUT else own.store or config.retrieval.store
    if not store:
        raise UserError("config.hidden.cut_store names no datastore; make one with build_datastore --excess_above")
    rest = config.retrieval.ray, config.retrieval.licences
    return RetrievalConfig(store, own.k, HIDDEN.name, own.search, own.storage, 0, own.scann, *rest)


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
