"""The datastore: what is written is read; killed and resumed = uninterrupted, to the byte; damage is told."""

import errno
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from arrag_jax import files
from arrag_jax.config import ScannOptions
from arrag_jax.data.examples import BadImage
from arrag_jax.errors import UserError
from arrag_jax.ops import grid as grid_ops
from arrag_jax.ops.keys.context import unit_norm
from arrag_jax.retrieval import index
from arrag_jax.retrieval.patches import stored_patches
from arrag_jax.retrieval.scann import ScannRetriever
from arrag_jax.retrieval.scann_rules import EXHAUSTIVE
from arrag_jax.store import building, writer
from arrag_jax.store.datastore import Datastore, StoreSettings
from arrag_jax.store.encoding import Encode, EncodedImages
from arrag_jax.store.skipped import SkipLimit
from helpers.stored import keys_of, values_of

GRID, V, C = (4, 5), 16, 8
CODEBOOK = unit_norm(np.random.default_rng(0).normal(size=(V, C)))


class Images:
    """Images of noise; image i is a function of i alone."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return {"image": np.random.default_rng(i).integers(0, 256, (*GRID, 3), np.uint8)}


def encode(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A fake tokenizer of one pixel a cell, with outputs that are not of unit norm."""
    codes = batch[..., 0].astype(np.int32) % V
    return codes, CODEBOOK[codes] * 3 + batch[..., 1:2].astype(np.float32) / 256


def settings(**changes) -> StoreSettings:
    fields = {
        "fingerprint": "tokenizer-a",
        "grid": GRID,
        "codebook_size": V,
        "code_dim": C,
        "keys": ("codebook", "latent"),
        "num_images": 23,
        "shard_size": 10,
        "source": "noise",
        "split": "store",
        "command": "test",
    }
    return StoreSettings(**{**fields, **changes})


def build(directory: Path, **changes) -> Datastore:
    return writer.build_datastore(directory, encoded(Images(23)), CODEBOOK, settings(**changes))


def encoded(images: Images, name: str = "noise/store/{}", by: Encode | None = None) -> EncodedImages:
    return EncodedImages(images, name.format, by or encode, 4)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Datastore:
    return build(tmp_path_factory.mktemp("stores") / "whole")


@pytest.fixture
def store(whole, tmp_path) -> Datastore:
    """A copy to damage."""
    for name, data in contents(whole.directory).items():
        (tmp_path / name).write_bytes(data)
    return Datastore.open(tmp_path)


def test_reads_what_was_encoded(whole):
    codes, latents = encode(np.stack([Images(23)[i]["image"] for i in range(23)]))
    np.testing.assert_array_equal(whole.codes, codes)
    np.testing.assert_array_equal(whole.records("latents"), unit_norm(latents).astype(np.float16))
    np.testing.assert_array_equal(whole.codebook, CODEBOOK)
    assert whole.sources == [f"noise/store/{i}" for i in range(23)]
    assert (whole.num_images, whole.num_patches) == (23, 23 * 3 * 3)
    whole.verify()


@pytest.mark.parametrize("kind", ["codebook", "latent"])
def test_keys_are_the_four_context_cells(whole, kind):
    """Against the definition, cell by cell; and each part has unit norm in float32."""
    patches = stored_patches(whole, kind, (0, whole.num_patches))
    rows = np.arange(whole.num_patches) if kind == "latent" else patches.rows
    keys, values = np.empty((len(rows), 4 * C), np.float32), np.empty(len(rows), np.int64)
    entry = rows if kind == "latent" else np.repeat(np.arange(len(patches.keys)), np.diff(patches.starts))
    keys[rows], values[rows] = patches.keys[entry], patches.codes
    vectors = CODEBOOK[whole.codes] if kind == "codebook" else unit_norm(whole.records("latents"))
    for row in range(0, whole.num_patches, 7):
        image, position = grid_ops.image_and_position(np.array(row), *GRID)
        r, c = divmod(int(position), GRID[1])
        parts = [vectors[image, r + dr, c + dc] for dr, dc in ((-1, -1), (-1, 0), (-1, 1), (0, -1))]
        np.testing.assert_array_equal(keys[row], np.concatenate(parts))
        assert values[row] == whole.codes[image, r, c]
    np.testing.assert_allclose(np.linalg.norm(keys.reshape(-1, 4, C), axis=-1), 1, atol=1e-6)


@pytest.mark.parametrize("count", [1, 10, 11, 23])
def test_subset_is_the_first_images(whole, count):
    part = whole.subset(count)
    np.testing.assert_array_equal(part.codes, whole.codes[:count])
    np.testing.assert_array_equal(part.records("latents"), whole.records("latents")[:count])
    assert part.sources == whole.sources[:count]


def test_without_latents(tmp_path):
    store = build(tmp_path, keys=("codebook",))
    assert not list(tmp_path.glob("latents*"))
    with pytest.raises(UserError, match="latent"):
        _ = store.records("latents")


KILLER = """
import os, pathlib, signal, sys
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import test_datastore as t
from arrag_jax.store import building

root, moment, left = pathlib.Path(sys.argv[3]), 0, 0

def tick():
  global left
  left -= 1
  if left == 0:
    os.kill(os.getpid(), signal.SIGKILL)

os.fsync = lambda handle: None  # a killed process, unlike a power cut, loses nothing that was written
rename, encode, Writer = pathlib.Path.rename, t.encode, building.ArrayRecordWriter

def ticking_rename(self, target):
  tick()
  rename(self, target)
  tick()

class TickingWriter:
  def __init__(self, *args):
    self.writer = Writer(*args)
    self.written = 0
  def write(self, record):
    self.writer.write(record)
    self.written += 1
    if self.written == 2:
      tick()
  def close(self):
    self.writer.close()
    tick()

def ticking_encode(batch):
  tick()
  return encode(batch)

def run(ticks):
  global left
  child = os.fork()
  if not child:
    left, sys.stderr = ticks, open(os.devnull, "w")
    pathlib.Path.rename, t.encode, building.ArrayRecordWriter = ticking_rename, ticking_encode, TickingWriter
    t.build(root / str(moment))
    os._exit(0)
  return os.waitpid(child, 0)[1]

killed = True
while killed:
  moment += 1
  killed = run(moment) == signal.SIGKILL
  if moment % 3 == 0:
    run(moment % 7 + 1)  # killed a second time, early
  assert run(0) == 0
print(moment)
"""


@pytest.mark.slow
def test_killed_and_resumed_is_uninterrupted(whole, tmp_path):
    """SIGKILL at every moment that matters: in a batch, in a shard, before and after each rename; twice."""
    here = Path(__file__).resolve().parent
    command = [sys.executable, "-c", KILLER, str(here.parent), str(here), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    moments = int(done.stdout)
    assert moments > 2 * 12 + 7  # 12 files renamed, 7 batches
    expected = contents(whole.directory)
    for moment in range(1, moments + 1):
        assert contents(tmp_path / str(moment)) == expected, moment


def test_what_was_bad_when_a_build_was_killed_may_be_good_by_now(whole, tmp_path, monkeypatch):
    """Killed between the list of a shard's bad images and its last file; then all can be read."""

    class Spoilt(Images):
        def __getitem__(self, i: int) -> dict[str, np.ndarray]:
            if i == 3:
                raise BadImage("not yet there")
            return super().__getitem__(i)

    write_lines = building.write_lines

    def stopping(path: Path, lines: list[str]) -> None:
        if path.name.startswith("sources"):
            raise KeyboardInterrupt
        write_lines(path, lines)

    with monkeypatch.context() as patch:
        patch.setattr(building, "write_lines", stopping)
        with pytest.raises(KeyboardInterrupt):
            writer.build_datastore(tmp_path, encoded(Spoilt(23)), CODEBOOK, settings(), SkipLimit(0.5))
    assert [path.name for path in tmp_path.glob("bad-*")] == ["bad-00000-of-00003.txt"]
    build(tmp_path)
    assert contents(tmp_path) == contents(whole.directory)


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("No space left on device")]
)
def test_full_disk_is_one_line_and_resumable(whole, tmp_path, monkeypatch, failure):
    """Full after 6 files: nothing half-written stays, and the same build goes on once there is space."""
    counter, whole_sync = itertools.count(1), files.sync

    def full(path: Path) -> None:
        if next(counter) > 6:
            raise failure
        whole_sync(path)

    with monkeypatch.context() as patch:
        patch.setattr("arrag_jax.files.sync", full)
        with pytest.raises(UserError, match="disk is full") as caught:
            build(tmp_path)
    assert "\n" not in str(caught.value)
    assert all(
        data == contents(whole.directory)[name]
        for name, data in contents(tmp_path).items()
        if name != building.BUILDING
    )
    with pytest.raises(UserError, match="no finished datastore"):
        Datastore.open(tmp_path)
    build(tmp_path)
    assert contents(tmp_path) == contents(whole.directory)


def test_other_settings_touch_nothing(store):
    before = contents(store.directory)
    for changes in ({"num_images": 22}, {"fingerprint": "tokenizer-b"}, {"keys": ("codebook",)}):
        with pytest.raises(UserError, match="other settings.*" + next(iter(changes))):
            build(store.directory, **changes)
    assert contents(store.directory) == before
    (store.directory / "manifest.json").rename(store.directory / "somebody's")
    with pytest.raises(UserError, match="other files"):
        build(store.directory)


def test_whole_store_is_not_built_again(store, monkeypatch):
    monkeypatch.setattr(building, "run_work", lambda *_, **__: pytest.fail("built again"))
    before = contents(store.directory)
    build(store.directory, command="another command")
    assert contents(store.directory) == before


def test_two_builders_exclude_each_other(tmp_path):
    with files.exclusive_lock(tmp_path), pytest.raises(UserError, match="another process"):
        build(tmp_path)


def test_bad_input_is_told_before_work(tmp_path):
    with pytest.raises(UserError, match="it has 23"):
        build(tmp_path / "few", num_images=24)
    with pytest.raises(UserError, match="65536"):
        settings(codebook_size=70_000)
    with pytest.raises(UserError, match="choose from"):
        settings(keys=("pixels",))
    assert not (tmp_path / "few").exists()
    with pytest.raises(UserError, match="codes from"):
        images = encoded(Images(23), by=lambda x: (encode(x)[0] + V, encode(x)[1]))
        writer.build_datastore(tmp_path, images, CODEBOOK, settings())


def test_other_tokenizer_is_refused(whole):
    whole.require_tokenizer("tokenizer-a")
    with pytest.raises(UserError, match=r"tokenizer-a.*tokenizer-b"):
        whole.require_tokenizer("tokenizer-b")


def test_records_cost_little_more_than_their_codes(tmp_path):
    """A shard of the default size: under 5 % over 2 bytes a code."""
    codes = np.zeros((16_384, 12, 12), "<u2")
    building.write_records(tmp_path / "codes", (grid.tobytes() for grid in codes), writer.RECORD_OPTIONS)
    assert (tmp_path / "codes").stat().st_size < 1.05 * codes.nbytes


@pytest.mark.parametrize("options", [EXHAUSTIVE, ScannOptions(exhaustive_below=0, leaves=8, leaves_to_search=8)])
def test_saved_index_searches_like_the_built_one(store, tmp_path, options):
    """Also after the store was moved. All leaves are searched, so both are exact; latents have no ties."""
    index.build_index(store, "latent", options)
    built = ScannRetriever.create(keys_of(store, "latent"), values_of(store), CODEBOOK, 5, EXHAUSTIVE).host
    moved = Datastore.open(tmp_path.rename(tmp_path.with_name(tmp_path.name + "-moved")))
    loaded = index.load_index(moved, "latent", 5, options)
    context = np.random.default_rng(0).integers(0, V, (6, 4)).astype(np.int32)
    for ours, theirs in zip(loaded.search(context, np.int32(0)), built.search(context, np.int32(0)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_wrong_index_is_refused(store, tmp_path):
    with pytest.raises(UserError, match="no index over latent keys"):
        index.load_index(store, "latent", 5, EXHAUSTIVE)
    index.build_index(store, "latent", EXHAUSTIVE)
    assert index.is_current(store, "latent", EXHAUSTIVE)
    tree = ScannOptions(exhaustive_below=0, leaves=8)
    with pytest.raises(UserError, match=r"leaves.*build_datastore"):
        index.load_index(store, "latent", 5, tree)
    with pytest.raises(UserError, match=r"rows.*build_datastore"):
        index.load_index(store.subset(5), "latent", 5, EXHAUSTIVE)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace("tokenizer-a", "tokenizer-b"))
    assert not index.is_current(Datastore.open(tmp_path), "latent", EXHAUSTIVE)
    index.build_index(Datastore.open(tmp_path), "latent", tree)  # replaces the stale one
    index.load_index(Datastore.open(tmp_path), "latent", 5, tree)


def test_interrupted_index_is_not_there(store, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(UserError, match="disk is full"):
        index.build_index(store, "latent", EXHAUSTIVE)
    assert not index.is_current(store, "latent", EXHAUSTIVE)
    assert not index.index_directory(store, "latent").exists()
