"""Captions beside images: paired as webdataset and img2dataset pair them, in folders and tars alike; bounded."""

import dataclasses
import json
import tarfile

import pytest

from arrag_jax import build_datastore
from arrag_jax.data import sources
from arrag_jax.data.entries import Entry
from arrag_jax.data.examples import caption_of
from arrag_jax.data.sidecars import LONGEST_JSON, LONGEST_TEXT
from arrag_jax.store.datastore import Datastore
from helpers import folders, malformed

# Name of an image → the files beside it, and its caption.
CASES = {
    "plain.png": ({".txt": b"a cat"}, "a cat"),
    "upper.PNG": ({".TXT": b"a cat"}, "a cat"),
    "kohya.png": ({".caption": b"a cat"}, "a cat"),
    "text.png": ({".json": b'{"text": "a cat"}'}, "a cat"),
    "caption.png": ({".json": b'{"text": "no", "caption": "a cat", "pwatermark": NaN}'}, "a cat"),
    "null.png": ({".json": b'{"caption": null, "TEXT": "a cat"}'}, "a cat"),
    "list.png": ({".json": b'{"caption": ["", "a cat", "no"]}'}, "a cat"),
    "bare.png": ({".json": b'"a cat"'}, "a cat"),
    "dots.left.v2.png": ({".txt": b"a cat"}, "a cat"),
    "exact.left.png": ({".txt": b"no", ".left.txt": b"a cat"}, "a cat"),
    "exact.left2.png": ({".left2.json": b'{"caption": "a cat"}', ".txt": b"no"}, "a cat"),
    "full.png": ({".png.txt": b"a cat", ".txt": b"no"}, "a cat"),
    "other.png": ({".b.txt": b"no"}, ""),
    "empty.png": ({".txt": b" \r\n", ".json": b'{"caption": "a cat"}'}, "a cat"),
    "emptyleft.left.png": ({".left.txt": b"", ".txt": b"a cat"}, "a cat"),
    "mark.png": ({".txt": b"\xef\xbb\xbfa cat"}, "a cat"),
    "wide.png": ({".txt": "a cät".encode("utf-16")}, "a cät"),
    "wider.png": ({".txt": b"\xfe\xff" + "a cät".encode("utf-16-be")}, "a cät"),
    "markjson.png": ({".json": b'\xef\xbb\xbf{"caption": "a cat"}'}, "a cat"),
    "lines.png": ({".txt": b"\n\n  a cat\r\nanother\n"}, "a cat"),
    "spoilt.png": ({".txt": b"\xff", ".json": b'{"caption": "a cat"}'}, "a cat"),
    "long.png": ({".txt": b"a cat\n" + b"x" * 2 * LONGEST_TEXT}, "a cat"),
    "cut.png": ({".txt": b"a cat\n" + "ü".encode() * LONGEST_TEXT}, "a cat"),
    "none.png": ({}, ""),
}  # fmt: skip
# …→ the files, and what is said of them.
FAULTS = {
    "latin.png": ({".txt": b"caf\xe9"}, "its caption in {}.txt cannot be read: 'utf-8' codec"),
    "binary.png": ({".txt": b"a\0b"}, "its caption in {}.txt cannot be read: it is no text"),
    "endless.png": ({".txt": b"x" * 2 * LONGEST_TEXT}, "its caption in {}.txt cannot be read: its first line is"),
    "deep.png": ({".json": b"[" * 10**5}, "its caption in {}.json cannot be read: it is nested too deeply"),
    "number.png": ({".json": b'{"caption": 7}'}, "its caption in {}.json cannot be read: its \"caption\" is no text"),
    "huge.png": (
        {".json": b'{"caption": "%s"}' % (b"x" * LONGEST_JSON)}, "its caption in {}.json cannot be read: it is longer"
    ),
}  # fmt: skip


def listed(folder) -> dict[str, Entry]:
    return {entry.id: entry for entry in sources.list_images(str(folder), captions=True)}


def test_each_image_has_the_caption_that_is_meant(tmp_path):
    files = {}
    for image, (beside, _) in (CASES | FAULTS).items():
        stem = image.partition(".")[0]
        files |= {f"sub/{image}": b"x", **{f"sub/{stem}{ending}": data for ending, data in beside.items()}}
    (tmp_path / "sub").mkdir()
    with tarfile.open(tmp_path / "web.tar", "w") as tar:
        for name, data in sorted(files.items(), reverse=True):
            malformed.add(tar, name, data)
            (tmp_path / name).write_bytes(data)
    found = listed(tmp_path)
    for where in ("sub/", "web.tar!sub/"):
        assert {image: found[where + image].caption for image in CASES} == {x: y for x, (_, y) in CASES.items()}
        assert not any(found[where + image].fault for image in CASES)
        for image, (_, fault) in FAULTS.items():
            assert found[where + image].fault.startswith(fault.format(where + image.partition(".")[0])), image
    assert len(found) == 2 * (len(CASES) + len(FAULTS))


def test_captions_of_other_folders_are_not_taken(tmp_path):
    for folder, words in (("one", "first"), ("two", "second")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(b"x")
        (tmp_path / folder / "a.txt").write_text(words)
    (tmp_path / "a.png").write_bytes(b"x")
    assert [entry.caption for entry in listed(tmp_path).values()] == ["", "first", "second"]


@pytest.mark.parametrize("form", [str.encode, str])
def test_a_caption_is_one_line_without_control_characters(form):
    caption = " a\x1b[31m cat\x00\x9b \u2028on\r\na\u202e mat\t"
    assert caption_of({"caption": form(caption)}) == "a [31m cat on a mat"
    assert caption_of({"caption": b"caf\xe9"}) == "caf\ufffd"


def test_the_closing_line_says_how_many_have_none(tmp_path, capsys):
    config = folders.config(tmp_path)
    for number in range(0, 23, 2):
        words = {"caption": f"scene\n\x1b[2J{number}"}
        (tmp_path / "photos" / f"scene_{number:02d}.json").write_text(json.dumps(words))
    build_datastore.run(dataclasses.replace(config, captions=True), str(tmp_path / "store"))
    assert "21 images (9 without caption)" in capsys.readouterr().out
    store = Datastore.open(tmp_path / "store")
    wanted = {f"scene_{i:02d}.png": "" if i % 2 else f"scene [2J{i}" for i in range(23)}
    assert dict(zip(store.sources, store.captions, strict=True)) == {name: wanted[name] for name in store.sources}
