"""JSON from outside: a value, or one line that names the file; never a traceback, never an endless read."""

import json

import pytest

from arrag_jax.errors import UserError
from arrag_jax.json_files import parse_json, read_json


@pytest.mark.parametrize("value", [{"a": [1, -2.5, "ü", None, True]}, [], "text", 0])
def test_what_json_writes_is_read_back(tmp_path, value):
    path = tmp_path / "value.json"
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    assert read_json(path) == value == parse_json(b"\xef\xbb\xbf" + path.read_bytes(), "bytes")


@pytest.mark.parametrize(
    "content",
    [b"{", b"", b"\xff\xfe{}", b"[" * 200_000, b'{"a":' * 200_000, b"[NaN]", b"[-Infinity]", b"9" * 10_000],
    ids=["cut", "empty", "not UTF-8", "deep lists", "deep objects", "NaN", "infinity", "huge number"],
)
def test_what_is_no_json_is_one_line_that_names_the_file(tmp_path, content):
    path = tmp_path / "value.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"value\.json") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


def test_a_file_is_read_up_to_its_limit_alone(tmp_path):
    path = tmp_path / "value.json"
    path.write_bytes(b'"' + b"x" * 98 + b'"')
    assert read_json(path, max_bytes=100) == "x" * 98
    with pytest.raises(UserError, match="larger than 99 bytes"):
        read_json(path, max_bytes=99)
    with pytest.raises(UserError, match="cannot read"):
        read_json(tmp_path)
