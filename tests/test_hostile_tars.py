"""Tars that may come from anybody: reads are bounded in time and memory, and nothing reaches a terminal raw."""

import dataclasses
import os
import random
import re
import subprocess
import sys
import tarfile
import time

import pytest

from arrag_jax import build_datastore
from arrag_jax.data import sources
from arrag_jax.data.examples import BadImage
from arrag_jax.errors import UserError, printable, run_command
from arrag_jax.store.datastore import Datastore
from arrag_jax.store.skipped import read_lines
from helpers import children, folders, malformed

GOOD = malformed.encoded("PNG")


def header(name: str, size: int, type_: bytes = tarfile.REGTYPE) -> bytes:
    """A header that claims a size, with its sum."""
    member = tarfile.TarInfo(name)
    member.size, member.type = max(size, 0), type_
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT)[-tarfile.BLOCKSIZE :])
    if size < 0:
        block[124:136] = size.to_bytes(12, "big", signed=True)
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % tarfile.BLOCKSIZE)


def member(name: str, data: bytes, type_: bytes = tarfile.REGTYPE) -> bytes:
    return header(name, len(data), type_) + padded(data)


def pax(records: bytes) -> bytes:
    return member("pax", records, tarfile.XHDTYPE)


FIRST = member("a.png", GOOD)
# Content of the tar, and what is said of it; its first member can be had whatever follows.
HOSTILE = {
    "negative": (FIRST + header("b.png", -512), "a member of no valid size at byte"),
    "back": (FIRST + header("b.png", -(len(FIRST) + 1024)), "a member of no valid size at byte"),
    "minus": (FIRST + pax(b"13 size=-512\n") + header("b.png", 0), "a member of no valid size at byte"),
    "word": (FIRST + pax(b"11 size=x1\n") + header("b.png", 0), "a member of no valid size at byte"),
    "name": (FIRST + header("b", 2**40, tarfile.GNUTYPE_LONGNAME), "a header of 1,099,511,627,776 bytes"),
    "records": (FIRST + header("b", 2**33, tarfile.XHDTYPE), "a header of 8,589,934,592 bytes"),
    "shared": (FIRST + header("b", 2**33, tarfile.XGLTYPE), "a header of 8,589,934,592 bytes"),
    "length": (FIRST + pax(b"99999999 path=b.png\n"), "invalid pax header"),
    "zero": (FIRST + pax(b"0 path=b.png\n") * 2, "invalid pax header"),
    "nothing": (FIRST + pax(b"x" * 900), "invalid pax header"),
    "huge": (FIRST + header("b.png", 2**60), "unexpected end of data"),
    "cut": (FIRST + member("b.png", GOOD)[:-1000], "unexpected end of data"),
    "torn": (FIRST + header("b.png", 0)[:100], "unexpected end of data"),
    "noise": (FIRST + random.Random(0).randbytes(5000), "invalid header at byte|bad checksum at byte"),
    "behind": (FIRST + bytes(1024) + b"GARBAGE" * 300, "invalid header at byte|bad checksum at byte"),
    "map": (FIRST + header("b.png", 0, tarfile.GNUTYPE_SPARSE), ""),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_cannot_be_followed_is_told_and_what_was_before_is_read(tmp_path, kind):
    content, reason = HOSTILE[kind]
    (tmp_path / "web.tar").write_bytes(content)
    begin = time.process_time()
    entries = sources.list_images(str(tmp_path))
    assert time.process_time() - begin < 1
    found = {entry.id: entry for entry in entries}
    assert sources.read_entry(tmp_path, found["web.tar!a.png"]) == GOOD
    if reason:
        assert re.match(rf"not a whole tar file \(1 images found in it\): ({reason})", found["web.tar"].fault)
    for entry in entries:
        if entry.id == "web.tar!b.png":
            with pytest.raises(BadImage):
                sources.read_entry(tmp_path, entry)


@pytest.mark.slow
def test_any_damage_is_survived(tmp_path):
    """Bytes changed anywhere, and cuts anywhere: no traceback, no long run, no entry outside of the file."""
    rng, path = random.Random(0), tmp_path / "web.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a.png", "ü" * 99 + ".png", "b.txt", "c.json"):
            malformed.add(tar, name, b'{"caption": "x"}')
    whole = path.read_bytes()
    begin = time.process_time()
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 3, 30))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[: rng.choice((len(data), rng.randrange(len(data))))])
        try:
            entries = sources.list_images(str(path), captions=rng.random() < 0.5)
        except UserError:
            continue
        size = path.stat().st_size
        assert all(entry.fault or entry.offset + entry.size <= size for entry in entries)
        assert all(printable(entry.id) == entry.id and printable(entry.fault) == entry.fault for entry in entries)
    assert time.process_time() - begin < 20


LIMITED = """
import resource, sys
from arrag_jax import build_datastore
from arrag_jax.data import sources
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for entry in sources.list_images(sys.argv[1], captions=True):
    try:
        sources.read_entry(sources.root_of(sys.argv[1]), entry)
    except Exception as error:
        print(entry.id, error)
print("MiB", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.slow
def test_gigabytes_that_a_tar_holds_are_not_read(tmp_path):
    """Captions, headers, images and zeros behind the end, all holes of a sparse file: a few MiB of memory, seconds."""
    huge = 2**32
    with open(tmp_path / "web.tar", "wb") as file:
        for name in ("a.txt", "b.json", "c.png"):
            file.write(header(name, huge))
            file.seek(huge, os.SEEK_CUR)
        for name in ("a.png", "b.png", "d.png"):
            file.write(member(name, GOOD))
        file.write(member("d.txt", b"a cat"))
        file.seek(huge, os.SEEK_CUR)
        file.write(member("e.png", GOOD))
        file.truncate(file.tell() + 2**40)
    for name in ("f.png", "g.txt"):
        (tmp_path / name).write_bytes(b"")
        os.truncate(tmp_path / name, huge)
    (tmp_path / "g.png").write_bytes(GOOD)
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(command, env=children.alone(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    *lines, memory = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["f.png", "g.png", *(f"web.tar!{name}.png" for name in "abc")]
    assert "f.png too large: 4,294,967,296 bytes" in lines[0]
    assert int(memory.split()[1]) < 64


EVIL = "\x1b[2J\x9b31m\r\n\u202e\u2028"


@pytest.mark.slow
def test_no_control_character_of_a_name_reaches_a_terminal_or_a_line(tmp_path, capfd):
    """In names of files, folders, tars and members, in reasons, in what commands print."""
    config = folders.config(tmp_path)
    photos = tmp_path / "photos"
    (photos / f"sub{EVIL}").mkdir()
    for name in (f"bad{EVIL}.png", f"sub{EVIL}/a.png", f"odd{EVIL}", f"odd.{EVIL}", f"x{EVIL}.txt"):
        (photos / name).write_bytes(b"x")
    tar = member(f"m{EVIL}.png", GOOD) + member("fine.png", GOOD) + header("b.png", -1)
    (photos / f"web{EVIL}.tar").write_bytes(tar)
    build_datastore.run(dataclasses.replace(config, max_bad_fraction=0.9), str(tmp_path / "store"))
    store = Datastore.open(tmp_path / "store")
    assert store.num_images == len(store.sources) == 21
    told = "".join(capfd.readouterr()) + "".join(map("".join, store.bad)) + "".join(store.sources)
    assert "bad\\x1b[2J\\x9b31m\\r\\n\\u202e\\u2028.png" in told
    assert not {"\x1b", "\x9b", "\u202e", "\u2028"} & set(told)
    assert all(len(line.split("\t")) == 2 for path in store.directory.glob("bad-*") for line in read_lines(path))


def test_errors_are_printed_without_control_characters(capsys):
    def fail(_):
        raise UserError(f"cannot read {EVIL}")

    with pytest.raises(SystemExit):
        run_command(fail, [])
    printed = capsys.readouterr().err
    assert printed == "error: cannot read \\x1b[2J\\x9b31m\\r\\n\\u202e\\u2028\n"


@pytest.mark.slow
def test_printable_escapes_controls_alone():
    kept = "ä ö 🚗 👨\u200d👩\u200d👧 日本語 עברית\u200f x\\n"
    assert printable(kept) == kept
    assert not set(printable("".join(map(chr, range(0x110000))))) & {
        *map(chr, range(32)),
        "\x7f",
        *map(chr, range(128, 160)),
    }
    assert printable("\ud800\u2066") == "\\ud800\\u2066"
