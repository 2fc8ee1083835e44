"""The report's figures against the naive search; which process reads what of an index."""

import json

import numpy as np
import pytest

from arrag_jax import build_datastore
from arrag_jax.config import ScannOptions
from arrag_jax.errors import UserError
from arrag_jax.ops import grid as grid_ops
from arrag_jax.ops.keys import KEY_KINDS
from arrag_jax.ops.keys.context import unit_norm
from arrag_jax.retrieval import index
from arrag_jax.retrieval import report as measure
from arrag_jax.retrieval.patches import KeysOfRows, Patches
from arrag_jax.store import writer
from arrag_jax.store.datastore import Datastore, StoreSettings
from arrag_jax.store.encoding import EncodedImages
from helpers import stored
from helpers.stored import keys_of

V, IMAGES = 16, 120
CODEBOOK = unit_norm(np.random.default_rng(0).normal(size=(V, 8)))
FEW_LEAVES = ScannOptions(exhaustive_below=0, leaves=60, leaves_to_search=2)
KEYS = {
    "recall_at_10", "recall_at_2048", "queries_per_second", "bytes_per_patch", "num_patches", "num_images", "num_bad",
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Datastore:
    """1,920 patches, fewer than the larger K."""
    rng = np.random.default_rng(1)
    grids = rng.integers(0, V, (IMAGES, 5, 6))
    directory = tmp_path_factory.mktemp("store")
    settings = StoreSettings(
        fingerprint="tokenizer", grid=(5, 6), codebook_size=V, code_dim=8, keys=("codebook",), num_images=IMAGES,
        shard_size=50, source="test", split="all",
    )  # fmt: skip
    images = [{"image": np.full((1, 1, 3), i, np.uint8), "source": f"image {i}"} for i in range(IMAGES)]

    def encode(pictures):
        return grids[pictures[:, 0, 0, 0]], np.zeros((len(pictures), 5, 6, 8), np.float32)

    encoded = EncodedImages(images, "test/all/{}".format, encode, 8)
    return writer.build_datastore(directory, encoded, CODEBOOK, settings)


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 3])
def test_recall_is_the_naive_one(store, shards):
    """An index that looks into 2 of 60 leaves misses much; how much, a plain search tells as well."""
    index.build_index(store, "codebook", FEW_LEAVES, shards)
    figures = measure.report(store, FEW_LEAVES)
    assert set(figures) == KEYS and json.loads((store.directory / "report.json").read_text()) == figures
    context = measure.held_out_contexts(store)
    true = ((CODEBOOK[context].reshape(-1, 1, 32) - keys_of(store, "codebook")[None]) ** 2).sum(2)
    host = index.load_index(store, "codebook", 10, FEW_LEAVES, shards)
    found = [host.search(context, np.int32(shard)) for shard in range(shards)]
    rows = np.concatenate([np.where(ids < 0, -1, ids + host.bounds[s][0]) for s, (_, _, ids) in enumerate(found)], 1)
    away = np.where(rows < 0, np.inf, np.take_along_axis(true, rows, 1))
    recall = (np.sort(away, 1)[:, :10] <= np.sort(true, 1)[:, 9:10] + 1e-5).mean()
    assert 0 < recall < 1
    assert figures["recall_at_10"] == pytest.approx(recall, abs=1e-9)
    counts = figures["num_patches"], figures["num_images"], figures["num_bad"]
    assert counts == (IMAGES * 16, IMAGES, 0)


def test_queries_are_not_stored(store):
    """Contexts read from right to left may be, such as those of a plain ground."""
    whole = {tuple(context) for context in grid_ops.contexts_of_grids(store.codes).reshape(-1, 4).tolist()}
    mirrored = grid_ops.contexts_of_grids(store.codes[:, :, ::-1]).reshape(-1, 4).tolist()
    assert any(tuple(context) in whole for context in mirrored)
    asked = measure.held_out_contexts(store)
    assert len(asked) == measure.QUERIES and not any(tuple(context) in whole for context in asked.tolist())


@pytest.mark.slow
def test_an_exact_index_finds_everything_and_its_bytes_are_counted(store, capsys):
    index.build_index(store, "codebook", ScannOptions())
    build_datastore.run(None, str(store.directory), report=True)
    printed, figures = capsys.readouterr().out, json.loads((store.directory / "report.json").read_text())
    assert figures["recall_at_10"] == figures["recall_at_2048"] == 1
    assert all(name in printed for name in KEYS)
    entries = len(np.unique(grid_ops.contexts_of_grids(store.codes).reshape(-1, 4), axis=0))
    keys, lists = 128 * entries, 16 * entries + 6 * store.num_patches + 4
    assert keys + lists <= figures["bytes_per_patch"] * store.num_patches <= keys + lists + 2000


def test_every_index_that_is_there_is_measured(tmp_path, capsys, monkeypatch):
    """Over latents alone, too."""
    monkeypatch.setattr(measure, "SECONDS", 0.01)
    both = stored.build(tmp_path / "store")
    index.build_index(both, "latent", ScannOptions())
    for kinds, files in (
        (["latent"], {"report.json"}),
        (["codebook", "latent"], {"report.json", "report-latent.json"}),
    ):
        build_datastore.run(None, str(both.directory), report=True)
        lines = capsys.readouterr().out.splitlines()
        assert [line for line in lines if line.startswith("index over")] == [
            f"index over {kind} keys" for kind in kinds
        ]
        assert {path.name for path in both.directory.glob("report*.json")} == files
        figures = json.loads((both.directory / max(files, key=lambda name: "latent" in name)).read_text())
        assert figures["recall_at_10"] == 1
        index.build_index(both, "codebook", ScannOptions())


def test_kth_distances_count_patches_not_contexts():
    rng = np.random.default_rng(2)
    contexts, query = rng.integers(0, 4, (500, 4)), rng.integers(0, V, (9, 4))
    parts = [Patches.deduplicate(part, np.zeros(len(part), int), CODEBOOK) for part in np.split(contexts, [123])]
    vectors = CODEBOOK[query].reshape(9, 32)
    true = np.sort(((vectors[:, None] - CODEBOOK[contexts].reshape(1, -1, 32)) ** 2).sum(2), 1)
    for k, found in zip((1, 10, 499), measure.kth_distances(parts, vectors, [1, 10, 499]), strict=True):
        np.testing.assert_allclose(found, true[:, k - 1], atol=1e-5)


def test_latents_are_counted_with_their_maps():
    maps = np.zeros((3, 5, 6, 8), np.float16)
    keys = KeysOfRows(KEY_KINDS["latent"], maps, CODEBOOK, 16, 32)
    assert Patches(keys, np.zeros(32, np.uint16)).nbytes == 2 * 5 * 6 * 8 * 2 + 64


def test_without_a_store_or_its_index_nothing_is_written(store, tmp_path):
    index.build_index(store, "codebook", ScannOptions())
    with pytest.raises(UserError, match="does not fit"):
        measure.report(store.subset(3))
    with pytest.raises(UserError, match="no finished datastore"):
        build_datastore.run(None, str(tmp_path), report=True)
    with pytest.raises(UserError, match="missing --config"):
        build_datastore.run(None, str(tmp_path))
    assert not (tmp_path / "report.json").exists()


def test_a_process_reads_its_own_shards_of_an_index_alone(store):
    """Damage elsewhere is another process' to tell."""
    directory = index.build_index(store, "codebook", ScannOptions(), shards=3)
    damaged = next((directory / "shard-00002").glob("*.npy"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert list(index.load_index(store, "codebook", 5, ScannOptions(), shards=3, local=[0, 1]).shards) == [0, 1]
    with pytest.raises(UserError, match=r"shard-00002.* is damaged"):
        index.load_index(store, "codebook", 5, ScannOptions(), shards=3, local=[2])
    with pytest.raises(UserError, match="has 3 shards, not 1"):
        index.load_index(store, "codebook", 5, ScannOptions())
