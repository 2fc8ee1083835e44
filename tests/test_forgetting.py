"""Laws of forgetting: no search, page or merge has a forgotten image, and a purge gives a store built without it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from arrag_jax import build_datastore
from arrag_jax.config import MeshConfig, RetrievalConfig, ScannOptions
from arrag_jax.errors import UserError
from arrag_jax.evaluation.origins import origins
from arrag_jax.files import exclusive_lock
from arrag_jax.mesh import make_mesh
from arrag_jax.ops.keys.context import unit_norm
from arrag_jax.retrieval import index, report
from arrag_jax.retrieval.captions import TermIndex
from arrag_jax.retrieval.leave_one_out import LeaveOneOut
from arrag_jax.retrieval.load import load_retriever
from arrag_jax.store import forgetting, segments, writer
from arrag_jax.store.datastore import Datastore, StoreSettings
from arrag_jax.store.encoding import EncodedImages
from helpers import tiny
from helpers.drawings import bytes_of
from helpers.stored import CODES, GRID, StoredImages

NAMES = [f"photos/{i}.png" for i in range(11)]
GONE = ["photos/0.png", "photos/7.png"]
EVERY = range(11)
KEPT = [i for i, name in enumerate(NAMES) if name not in GONE]
GRIDS = np.random.default_rng(3).integers(0, CODES, (len(NAMES), *GRID))
ALL = ScannOptions(exhaustive_below=10**6)


def encode(images):
    """Codes from the pixels, and latents that depend on each picture alone."""
    codes = images[..., 0].astype(np.int32)
    latents = [np.random.default_rng(grid.ravel()).normal(size=(*GRID, 8)) for grid in codes]
    return codes, np.stack(latents).astype(np.float32)


def built(folder, numbers=EVERY) -> Datastore:
    """A store of some of the pictures under their names, in shards of four."""
    numbers = list(numbers)
    pictures = StoredImages(GRIDS[numbers], [f"a cat {i}" if i % 2 else "a dog" for i in numbers])
    settings = StoreSettings(
        fingerprint="f", grid=GRID, codebook_size=CODES, code_dim=8, keys=("codebook", "latent"), captions=True,
        num_images=len(numbers), shard_size=4, source="photos", split="train",
    )  # fmt: skip
    images = EncodedImages(pictures, lambda i: NAMES[numbers[i]], encode, 3)
    return writer.build_datastore(folder, images, unit_norm(np.asarray(tiny.janus().codebook)), settings)


@pytest.fixture(scope="module")
def forgotten(tmp_path_factory) -> Datastore:
    """A store with saved indexes, of which two images were forgotten afterwards."""
    store = built(tmp_path_factory.mktemp("forgotten") / "store")
    for kind in ("codebook", "latent"):
        index.build_index(store, kind, ALL)
    build_datastore.run(None, str(store.directory), forget=GONE[:1])
    build_datastore.run(None, str(store.directory), forget=GONE[1:])
    return Datastore.open(store.directory)


@pytest.fixture(scope="module")
def without(tmp_path_factory) -> Datastore:
    return built(tmp_path_factory.mktemp("without") / "store", KEPT)


def search(store: Datastore, kind: str, how: str, mesh=None):
    config = RetrievalConfig(str(store.directory), k=9, keys=kind, search=how, scann=ALL)
    return load_retriever(config, "f", mesh, "data")[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "how"),
    [("codebook", "dense"), ("latent", "dense"), ("codebook", "scann"), ("latent", "scann"), ("codebook", "sharded")],
)
def test_every_search_finds_what_a_store_without_the_images_gives(forgotten, without, kind, how):
    """Saved indexes included; rows keep their numbers."""
    mesh = make_mesh(MeshConfig(2, 4)) if how == "sharded" else None
    context = jnp.asarray(np.random.default_rng(0).integers(0, CODES, (6, 4)), jnp.int32)
    expected = search(without, kind, "dense").search(context)
    found = search(forgotten, kind, "dense" if how == "sharded" else how, mesh).search(context)
    patches = forgotten.settings.patches_per_image
    image, place = np.divmod(np.asarray(expected.id), patches)
    np.testing.assert_array_equal(found.distance, expected.distance)
    np.testing.assert_array_equal(found.code, expected.code)
    np.testing.assert_array_equal(found.id, np.array(KEPT)[image] * patches + place)


@pytest.mark.slow
def test_captions_neighbours_pages_and_reports_are_those_of_the_rest(forgotten, without, monkeypatch):
    chosen = TermIndex(forgotten.captions, forgotten.shown).nearest(["a dog"], len(KEPT))[0]
    assert sorted(chosen.tolist()) == KEPT
    rest = TermIndex(without.captions).nearest(["a dog", "a cat 5"], len(KEPT))
    ours = TermIndex(forgotten.captions, forgotten.shown).nearest(["a dog", "a cat 5"], len(KEPT))
    np.testing.assert_array_equal(ours, np.array(KEPT)[rest])
    alone = LeaveOneOut(forgotten, forgotten.sources, search(forgotten, "codebook", "dense"))
    found = np.asarray(alone.search(GRIDS[:2], NAMES[:2]).id) // forgotten.settings.patches_per_image
    assert not np.isin(found, [NAMES.index(name) for name in GONE]).any()
    rows = np.arange(GRID[0] * GRID[1])  # patches of images that are all kept
    credit = origins(rows + forgotten.settings.patches_per_image, forgotten.shown_codes).credit
    assert not credit[[0, 7]].any() and credit.any()
    monkeypatch.setattr(report, "SECONDS", 0.01)
    assert report.report(forgotten, ALL, "codebook")["num_images"] == len(KEPT)


def test_a_purge_leaves_the_bytes_of_a_store_that_was_built_without_them(without, tmp_path):
    directory = tmp_path / "store"
    built(directory)
    forgetting.forget(directory, GONE)
    build_datastore.run(None, str(directory), purge=True)
    assert bytes_of(directory) == bytes_of(without.directory)
    with pytest.raises(UserError, match="nothing is forgotten"):
        build_datastore.run(None, str(directory), purge=True)


def test_a_merge_takes_no_forgotten_image(forgotten, tmp_path):
    merged = segments.merge([forgotten], tmp_path / "merged")
    assert merged.sources == [NAMES[i] for i in KEPT]
    assert not merged.forgotten


def test_what_cannot_be_forgotten_is_said_and_nothing_is(tmp_path):
    directory, listed = tmp_path / "store", tmp_path / "names.txt"
    built(directory)
    before = bytes_of(directory)
    listed.write_text("\n".join([NAMES[3], "beach.jpg", *(f"x{i}" for i in range(6))]))
    with pytest.raises(UserError, match=r"holds no image 'beach.jpg'.* and 2 more; nothing was forgotten"):
        build_datastore.run(None, str(directory), forget_list=str(listed))
    with pytest.raises(UserError, match="would hold no image any more"):
        forgetting.forget(directory, NAMES)
    with exclusive_lock(directory), pytest.raises(UserError, match="another process is writing"):
        forgetting.forget(directory, GONE)
    assert bytes_of(directory) == before
    (directory / "forgotten.json").write_text('{"names": 3}')
    with pytest.raises(UserError, match=r"forgotten.json is damaged"):
        Datastore.open(directory)


@pytest.mark.slow
def test_licences_limit_every_search_and_survive_a_purge(tmp_path):
    directory, beside = tmp_path / "store", tmp_path / "photos"
    built(directory)
    config = RetrievalConfig(str(directory), 5, search="dense", licences=("CC0",))
    with pytest.raises(UserError, match="no image with licence cc0: none are recorded; give build_datastore --rights"):
        load_retriever(config, "f")
    beside.mkdir()
    for name, licence in ((NAMES[1], "cc0"), (NAMES[7], "CC0 ")):
        path = (tmp_path / name).with_suffix(".json")
        path.write_text(json.dumps({"caption": "a cat", "license": licence, "url": f"https://example.org/{name}"}))
    build_datastore.run(None, str(directory), rights=str(tmp_path))
    lines = tmp_path / "more.jsonl"
    lines.write_text(json.dumps({"image": NAMES[2], "licence": "cc-by"}) + "\n")
    build_datastore.run(None, str(directory), rights=str(lines))
    found, retriever = load_retriever(config, "f")
    assert np.flatnonzero(found.shown).tolist() == [1, 7]
    ids = np.asarray(retriever.search(jnp.zeros((1, 4), jnp.int32)).id)
    assert set((ids // found.settings.patches_per_image).ravel().tolist()) <= {1, 7}
    assert found.rights[NAMES[7]].source.endswith(NAMES[7])
    with pytest.raises(UserError, match="licence pd: those recorded are cc-by, cc0"):
        load_retriever(RetrievalConfig(str(directory), 5, search="dense", licences=("pd",)), "f")
    lines.write_text('{"image": "beach.jpg", "licence": "cc0"}')
    with pytest.raises(UserError, match=r"holds no image .beach\.jpg."):
        build_datastore.run(None, str(directory), rights=str(lines))
    forgetting.forget(directory, GONE)
    forgetting.purge(directory)
    assert sorted(Datastore.open(directory).rights) == [NAMES[1], NAMES[2]]
