"""What a traced function consists of."""

from collections.abc import Iterator

from jax.extend import core


def equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """Also those in the bodies of loops and calls."""
    for equation in jaxpr.eqns:
        yield equation
        for body in core.jaxprs_in_params(equation.params):
            yield from equations(body)
