"""A folder or a tar becomes a store: with the model's own codes, without the bad images, whenever it is killed."""

import dataclasses
import json
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from arrag_jax import build_datastore
from arrag_jax.config import DatastoreConfig, ScannOptions
from arrag_jax.data.sources import FileImages, list_images, read_entry
from arrag_jax.errors import UserError
from arrag_jax.models.checkpoint import load_tokenizer
from arrag_jax.nn.vq import from_uint8
from arrag_jax.ops.keys.context import unit_norm
from arrag_jax.retrieval import index, report
from arrag_jax.store import building, writer
from arrag_jax.store.datastore import Datastore, StoreSettings
from arrag_jax.store.encoding import EncodedImages
from arrag_jax.store.images import LISTING
from helpers import children, folders
from helpers.folders import BAD, codes_of, contents, write_scenes
from helpers.stored import values_of

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = str(ROOT / "arrag_jax" / "assets" / "emoji_janus")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DatastoreConfig:
    return folders.config(tmp_path_factory.mktemp("folders"))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> Datastore:
    return folders.built(config, tmp_path_factory.mktemp("stores") / "whole")


def test_holds_the_codes_of_the_good_images(whole, config):
    good = [f"scene_{i:02d}.png" for i in range(23) if f"scene_{i:02d}.png" not in BAD]
    assert whole.sources == good
    np.testing.assert_array_equal(whole.codes, codes_of(config.model, Path(config.source), good))
    assert whole.bad == [("scene_05.png", "empty file"), ("scene_11.png", "not an image that PIL reads")]
    assert (whole.num_images, whole.num_bad, whole.settings.num_images) == (21, 2, 23)
    assert whole.num_patches == len(values_of(whole))
    for count in (1, 5, 6, 20, 21):
        np.testing.assert_array_equal(whole.subset(count).codes, whole.codes[:count])
        assert whole.subset(count).sources == good[:count]
    whole.verify()


def test_too_many_bad_images_fail_and_more_can_be_allowed(whole, config, tmp_path):
    strict = dataclasses.replace(config, max_bad_fraction=0.05)
    for _ in range(2):  # no less so when it is run again
        with pytest.raises(UserError, match=r"2 of 23 images cannot be read \(scene_05.png: empty file; scene_11"):
            build_datastore.run(strict, str(tmp_path / "store"))
    build_datastore.run(config, str(tmp_path / "store"))
    assert contents(tmp_path / "store") == contents(whole.directory)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 1 images can be read"):
        build_datastore.run(
            dataclasses.replace(config, source=str(tmp_path / "bad"), max_bad_fraction=1.0), str(tmp_path / "none")
        )


KILLED = """
import os, random, sys, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from arrag_jax import build_datastore
from arrag_jax.config import DatastoreConfig, ScannOptions
from arrag_jax.retrieval import build
from arrag_jax.retrieval.scann import import_scann
from arrag_jax.store import from_images

CODEBOOK = np.eye(8, dtype=np.float32)
tokenizer = SimpleNamespace(
    grid=(4, 5), codebook_size=8, codebook=CODEBOOK, image_size=(4, 5), fingerprint="fake"
)

def encode(images):
    time.sleep(0.002)
    codes = images[..., 0].astype(np.int32) % 8
    return codes, CODEBOOK[codes]

build.load_tokenizer, from_images.encoder = (lambda _: tokenizer), (lambda _: encode)
import_scann()
source, root, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
tree = ScannOptions(exhaustive_below=0, leaves=20)
config = DatastoreConfig("model", source, batch_size=3, shard_size=7, max_bad_fraction=0.2, scann=tree)

def run(name, moment=None):
    child = os.fork()
    if not child:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        build_datastore.run(config, str(root / name))
        os._exit(0)
    if moment is not None:
        time.sleep(moment)
        os.kill(child, 9)
    return os.waitpid(child, 0)[1]

begin = time.perf_counter()
assert run("whole") == 0
length, killed, tried = time.perf_counter() - begin, 0, 0
while killed < kills:  # one in each equal share of a build; whoever was done before it was killed is tried again
    name, tried = f"killed_{tried}", tried + 1
    assert tried < 5 * kills
    hit = run(name, (killed + random.Random(tried).random()) / kills * length) == 9
    killed, length = killed + hit, length if hit else 0.9 * length  # the first build may have had less of the machine
    assert run(name) == 0
"""


@pytest.mark.slow
@pytest.mark.long
def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(config, tmp_path):
    """SIGKILL at 20 moments spread over the whole command, from the listing of the folder to the index.

    A ScaNN tree starts at random, so that of the index alone the bytes differ: it has to be whole and current.
    """
    command = [sys.executable, "-c", KILLED, config.source, str(tmp_path), "20"]
    done = subprocess.run(command, env=children.alone(), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr

    def without_index(store: Path) -> dict[str, bytes | None]:
        return {name: None if name.startswith("index-codebook/") else x for name, x in contents(store).items()}

    expected = without_index(tmp_path / "whole")
    assert {"codes-00003-of-00004.arrayrecord", "index-codebook/index.json"} <= expected.keys()
    stores = list(tmp_path.glob("killed_*"))
    assert len(stores) >= 20
    for store in stores:
        assert without_index(store) == expected, store
        index.verify_indexes(Datastore.open(store))
        assert index.is_current(Datastore.open(store), "codebook", ScannOptions(exhaustive_below=0, leaves=20))


@pytest.mark.slow
def test_the_list_made_at_the_start_counts(whole, config, tmp_path, monkeypatch):
    """Stopped after two shards; then an image is added to the folder, one is changed and one taken away."""
    source = write_scenes(tmp_path / "photos", range(23))
    moved = dataclasses.replace(config, source=str(source), max_bad_fraction=0.5)
    write_lines, calls = building.write_lines, []

    def stopping(path: Path, lines: list[str]) -> None:
        calls.append(path)
        if len(calls) > 3:
            raise KeyboardInterrupt
        write_lines(path, lines)

    with monkeypatch.context() as patch:
        patch.setattr(building, "write_lines", stopping)
        with pytest.raises(KeyboardInterrupt):
            build_datastore.run(moved, str(tmp_path / "store"))
    assert (tmp_path / "store" / LISTING).exists()
    shutil.copy(source / "scene_00.png", source / "scene_00b.png")
    (source / "scene_20.png").write_bytes(b"other")
    (source / "scene_21.png").unlink()
    build_datastore.run(moved, str(tmp_path / "store"))
    store = Datastore.open(tmp_path / "store")
    assert store.sources == [name for name in whole.sources if name not in ("scene_20.png", "scene_21.png")]
    assert [name for name, _ in store.bad] == [*BAD, "scene_20.png", "scene_21.png"]
    before = contents(store.directory)
    shutil.rmtree(source)
    build_datastore.run(moved, str(store.directory))  # a whole store does not need its source
    assert contents(store.directory) == before
    assert not (store.directory / LISTING).exists()
    (store.directory / "manifest.json").unlink()
    (store.directory / "building.json").write_text(json.dumps(store.manifest["settings"]))
    with pytest.raises(UserError, match="is damaged: it lists an unfinished build's images; choose another --workdir"):
        build_datastore.run(moved, str(store.directory))


def test_the_size_of_a_store_is_bounded(tmp_path):
    """Whatever the codes are, 5 % over two bytes each and the ids, from 2,500 images of 24 x 24 codes on."""
    grid, count, size = (24, 24), 2_500, 2**16
    images = np.random.default_rng(0).integers(0, size, (count, *grid), np.uint16)
    codebook = unit_norm(np.random.default_rng(0).normal(size=(size, 8)))
    settings = {"fingerprint": "x", "grid": grid, "codebook_size": size, "code_dim": 8, "keys": ("codebook",)}
    settings |= {"num_images": count, "shard_size": 16_384, "source": "photos", "split": ""}

    class Grids:
        def __len__(self) -> int:
            return count

        def __getitem__(self, i: int) -> dict[str, np.ndarray]:
            return {"image": images[i].view(np.uint8).reshape(*grid, 2)}

    def encode(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return batch.view(np.uint16)[..., 0].astype(np.int32), np.broadcast_to(codebook[0], (len(batch), *grid, 8))

    encoded = EncodedImages(Grids(), "holiday/{:06d}.jpg".format, encode, 500)
    store = writer.build_datastore(tmp_path / "store", encoded, codebook, StoreSettings(**settings))
    np.testing.assert_array_equal(store.codes, images)
    names = [name for name in store.files if name != "codebook.npz"]  # the tokenizer's, whatever N is
    ids = sum(len(source) + 1 for source in store.sources)
    total = sum(store.files[name]["bytes"] for name in names) + (store.directory / "manifest.json").stat().st_size
    assert total <= 1.05 * count * 24 * 24 * 2 + ids
    assert total <= 1_250 * count


@pytest.mark.slow
def test_three_commands_make_a_picture_of_a_folder_of_photos(photos, tmp_path, monkeypatch):
    """Those of docs/stores.md: a store of the model's codes, its index measured, a DAiD image that names its photos."""
    listed = FileImages(photos, list_images(str(photos / "flickr8k_dev_224.tar"))[:40], (48, 48))
    (tmp_path / "photos").mkdir()
    for i, entry in enumerate(listed.entries):
        (tmp_path / "photos" / f"{i:02d}.jpg").write_bytes(read_entry(photos, entry))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(report, "SECONDS", 0.1)
    section = Path("docs/stores.md").read_text().partition("## Three commands")[2]
    text = section.split("```")[1].replace("\\\n", " ").replace("runs/photos", str(tmp_path / "store"))
    text = text.replace("=photos", f"={tmp_path / 'photos'}").replace("pictures", str(tmp_path / "pictures"))
    commands = [shlex.split(line) for line in text.strip().splitlines()]
    assert len(commands) == 3
    for python, flag, module, *arguments in commands:
        assert (python, flag) == ("python", "-m")
        one_device = ["--config.mesh.data=1"] if module == "arrag_jax.generate" else []
        monkeypatch.setattr(sys, "argv", [module, *arguments, *one_device])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(module, run_name="__main__")
        assert not ended.value.code, module
    store, tokenizer = Datastore.open(tmp_path / "store"), load_tokenizer(EMBEDDED)
    names = [f"{i:02d}.jpg" for i in range(40)]
    assert (store.sources, store.num_bad) == (names, 0)
    images = np.stack([listed[i]["image"] for i in range(40)])
    padded = np.concatenate([images, images[:24]])  # in a batch of 64, as the store was made
    codes = np.asarray(tokenizer.encode_images(from_uint8(padded))[0])[:40]
    np.testing.assert_array_equal(store.codes.reshape(40, -1), codes)
    assert json.loads((store.directory / "report.json").read_text())["recall_at_10"] == 1
    (record,) = json.loads((tmp_path / "pictures" / "provenance.json").read_text())
    held = [position for position in record["cells"] if position["rank"] is not None]
    assert held and all(codes[position["image"], position["image_cell"]] == position["code"] for position in held)
    assert {source["source"] for source in record["sources"]} <= set(names)
    assert (tmp_path / "pictures" / "provenance_00_daid.png").exists()
