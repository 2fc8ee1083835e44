"""Laws of the table of methods."""

import operator

import pytest

from arrag_jax.config import DrawConfig, RetrievalConfig
from arrag_jax.decode.methods import BASELINE, METHODS, Kind, Search, chosen_methods
from arrag_jax.errors import UserError
from arrag_jax.evaluation.run_folder import NAME

CONFIG = DrawConfig("model", RetrievalConfig("store"))


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_fields_belong_together(name):
    method, policy = METHODS[name], METHODS[name].policy(CONFIG)
    assert policy.uses_retrieval == (method.search is not Search.NONE)
    assert policy.blends == (method.model in (Kind.FAID, Kind.FAID_HIDDEN))
    assert (method.images is not None) == method.limited <= policy.uses_retrieval
    assert NAME.fullmatch(f"00_{name}")  # else a run would not remove what another one drew with it
    assert operator.attrgetter(method.model.value)(CONFIG) is not None


def test_methods_are_chosen_in_the_order_of_the_table():
    assert chosen_methods((), {*Kind}) == ("plain", "daid", "lora", "faid", "faid+daid")
    assert chosen_methods((), {Kind.BASE}) == ("plain", "daid")
    assert chosen_methods(("caption", BASELINE), {Kind.BASE}) == (BASELINE, "caption")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("diad", f"'diad' is unknown; choose one of {', '.join(METHODS)}".replace("+", r"\+")),
        ("lora", r"'lora' needs another model: give config\.lora_model, or choose one of plain, static, daid, caption"),
        ("faid+daid", r"'faid\+daid' needs another model: give config\.faid_model"),
    ],
)
def test_methods_that_cannot_be_drawn(name, message):
    with pytest.raises(UserError, match=message):
        chosen_methods((name,), {Kind.BASE})
