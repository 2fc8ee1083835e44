"""Mutations of JSON: every value of a document in turn becomes something else, or the document is cut and bent."""

import contextlib
import copy
import json
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from arrag_jax.errors import UserError

SECONDS, MEMORY = 5, 2**30  # that one mutation may take
DEEP = "[" * 500 + "]" * 500
# JSON texts that stand in a value's place; some are none.
VALUES = [
    "null", "true", "false", '"x"', '""', "-1", "0", "1", "2", "3.0", "1.5", "-0.5", "255", "65536", "1000000000",
    "2147483648", "1000000000000000000", "9223372036854775808", "1" + "0" * 400, "-1" + "0" * 400, "1e400", "NaN",
    "-Infinity", "1e-300", "[]", "{}", "[1]", "[0, 0]", "[1000000000, 1000000000]", "[null]", '["x", 1]', '{"a": 1}',
    '"../x"', '"/dev/zero"', '"."', '".."', '"part-00001"', '"manifest.json"', r'"a\u0000b"', r'"\ud800"', r'"a\nb"',
    DEEP, '{"a":' * 60 + "1" + "}" * 60, '"' + "y" * 100_000 + '"', json.dumps(list(range(20_000))), '"3"', '"NaN"',
]  # fmt: skip
MARK = "\u2020 a place \u2020"


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of each value in a document but the document itself; of a long list the first three."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, x in inner:
        yield (*path, key)
        yield from places(x, (*path, key))


def replaced(document: Any, path: tuple, text: str) -> str:
    """The document as JSON, with another text in one place."""
    new = copy.deepcopy(document)
    at(new, path[:-1])[path[-1]] = MARK
    return json.dumps(new).replace(json.dumps(MARK), text)


def at(value: Any, path: tuple) -> Any:
    """What stands at a path."""
    for key in path:
        value = value[key]
    return value


def mutations(document: Any, number: int, seed: int = 0) -> list[str]:
    """So many texts, each a document with one mutation; or every one that there is, where these are fewer."""
    rng, found = np.random.default_rng(seed), list(places(document))
    texts = [replaced(document, path, value) for path in found for value in VALUES]
    texts = [texts[i] for i in sorted(rng.permutation(len(texts))[:number])]
    for path in found:
        without, twice = copy.deepcopy(document), copy.deepcopy(document)
        del at(without, path[:-1])[path[-1]]
        other = found[rng.integers(len(found))]
        at(twice, path[:-1])[path[-1]] = copy.deepcopy(at(document, other))
        texts += [json.dumps(without), json.dumps(twice)]
    whole = json.dumps(document)
    return [*texts, *VALUES, *(whole[: int(i)] for i in rng.integers(0, len(whole), 20)), whole + whole]


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Fails what takes longer or allocates more than one mutation may."""

    def late(*_) -> None:
        raise TimeoutError

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, before[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, handler)


def assert_told(path: Path, texts: list[str], load: Callable[[], Any], *same: Any) -> tuple[int, int]:
    """Each text in the file loads with the result of the file as it was, or gives one line that names it or its folder.

    Args:
      load: its result must be among ``same`` where any are given.

    Returns:
      How many loaded, and how many were refused.
    """
    before, loaded, refused = path.read_bytes(), 0, 0
    try:
        for text in texts:
            path.write_text(text, encoding="utf-8", errors="surrogatepass")
            try:
                with bounded():
                    found = load()
            except UserError as error:
                message, refused = str(error), refused + 1
                lines = message.split("\n  ")  # the tensors that a model lacks stand one a line
                assert len(lines) == 1 or "does not hold the model of its config.json:" in lines[0], text[:300]
                assert all(line.isprintable() for line in lines), (message, text[:300])
                assert path.name in message or str(path.parent) in message, (message, text[:300])
                assert all(len(line) < 5000 for line in lines), text[:300]
            except BaseException as error:
                raise AssertionError(f"{type(error).__name__}: {str(error)[:900]} at {text[:2000]}") from error
            else:
                loaded += 1
                assert not same or found in same, text[-2000:]
    finally:
        path.write_bytes(before)
    return loaded, refused
