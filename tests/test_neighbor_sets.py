"""Neighbour sets: own patches are left out; killed and resumed = uninterrupted, to the byte; damage is told."""

import json
from pathlib import Path

import grain
import numpy as np
import pytest
import test_datastore as base

from arrag_jax.config import ScannOptions
from arrag_jax.data.examples import BadImage
from arrag_jax.errors import UserError
from arrag_jax.ops import grid as grid_ops
from arrag_jax.retrieval import leave_one_out, scann_rules
from arrag_jax.retrieval.dense import DenseRetriever
from arrag_jax.retrieval.leave_one_out import LeaveOneOut
from arrag_jax.retrieval.scann import ScannRetriever
from arrag_jax.store import building, shards, writer
from arrag_jax.store.datastore import Datastore
from arrag_jax.store.neighbor_set import NeighborSet, NeighborSettings, from_record, to_record
from arrag_jax.store.skipped import SkipLimit
from helpers.stored import keys_of, values_of

GRID, V, CODEBOOK = base.GRID, base.V, base.CODEBOOK
CELLS, PATCHES, K = GRID[0] * GRID[1], 9, 4


@pytest.fixture(autouse=True, scope="module")
def small_calls():
    """Fifty contexts a call of the search, not thousands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leave_one_out, "ANSWERS", 50 * K)
        yield


class Grids:
    """Images whose codes ``base.encode`` reads off; captions need more than ASCII."""

    def __init__(self, codes: np.ndarray):
        self.codes = codes

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, i: int) -> dict:
        return {
            "image": np.repeat(self.codes[i].astype(np.uint8)[..., None], 3, 2),
            "caption": f"een één · 🐱 {i}".encode(),
        }


def grids(count: int, seed: int, codes: int = 3) -> np.ndarray:
    """Code grids in which contexts come back often, inside one image too."""
    return np.random.default_rng(seed).integers(0, codes, (count, *GRID))


UNKNOWN = [f"unknown/{i}" for i in range(6)]  # names of the queries that no stored image has
QUERIES = np.concatenate([grids(5, 1), np.full((1, *GRID), 2)])  # the last: one context in every cell
STORED = {
    "absent": grids(20, 2),
    "once": np.concatenate([grids(20, 2), QUERIES]),
    "twice": np.concatenate([QUERIES, grids(20, 2), QUERIES]),
    "alone": np.concatenate([QUERIES[:1]] * 3),  # nothing is left for the first, nine patches a copy for the others
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, Datastore]:
    def make(name: str, codes: np.ndarray) -> Datastore:
        settings = base.settings(num_images=len(codes), keys=("codebook",))
        return writer.build_datastore(tmp_path_factory.mktemp(name), base.encoded(Grids(codes)), CODEBOOK, settings)

    return {name: make(name, codes) for name, codes in STORED.items()}


def retriever(store: Datastore, search: str, k: int = K) -> DenseRetriever | ScannRetriever:
    arrays, exact = (keys_of(store, "codebook"), values_of(store), store.codebook, k), scann_rules.EXHAUSTIVE
    return DenseRetriever.create(*arrays) if search == "dense" else ScannRetriever.create(*arrays, exact)


def leave_one_out_of(store: Datastore, search: str = "dense") -> LeaveOneOut:
    return LeaveOneOut(store, store.sources, retriever(store, search))


def oracle(codes: np.ndarray, stored: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For every query: distances, in float64, to all patches of stored images that differ, and their codes."""
    book, distances, values = CODEBOOK.astype(np.float64), [], []
    for grid in codes:
        rest = stored[(stored != grid).any((1, 2))]
        keys = book[grid_ops.contexts_of_grids(rest)].reshape(-1, 32) if len(rest) else np.empty((0, 32))
        for context in grid_ops.contexts_of_grids(grid[None])[0]:
            distances.append(((keys - book[context].reshape(32)) ** 2).sum(1))
            values.append(rest[:, 1:, 1:-1].reshape(-1))
    return distances, values


@pytest.mark.parametrize("search", ["dense", "scann"])
@pytest.mark.parametrize("name", STORED)
def test_equals_the_exact_search_without_own_images(stores, name, search):
    store = stores[name]
    found = leave_one_out_of(store, search).search(QUERIES, UNKNOWN)
    for q, (away, value) in enumerate(zip(*oracle(QUERIES, STORED[name]), strict=True)):
        expected = np.full(K, np.inf)
        expected[: len(away)] = np.sort(away)[:K]
        np.testing.assert_allclose(found.distance[q], expected, atol=2e-6)
        hit = found.id[q] >= 0
        assert len(set(found.id[q][hit])) == hit.sum() == np.isfinite(expected).sum()
        image, _ = grid_ops.image_and_position(found.id[q][hit], *GRID)
        assert (store.codes[image] != QUERIES[q // PATCHES]).any((1, 2)).all()
        np.testing.assert_array_equal(found.code[q], np.where(hit, values_of(store)[found.id[q]], -1))
        farthest = expected[np.isfinite(expected)].max(initial=0)  # nearer ones must be there, whatever the ties
        nearer = np.sort(value[away < farthest - 1e-5])
        np.testing.assert_array_equal(np.sort(found.code[q][found.distance[q] < farthest - 1e-5]), nearer)


@pytest.mark.parametrize("name, rounds", [("absent", 1), ("twice", 2)])
def test_a_context_is_asked_for_once_unless_too_few_are_left(stores, monkeypatch, name, rounds):
    asked, search = [], leave_one_out._search
    monkeypatch.setattr(leave_one_out, "ANSWERS", 5 * K)  # five contexts a call
    monkeypatch.setattr(
        leave_one_out, "_search", lambda who, context: asked.append((who.k, context)) or search(who, context)
    )
    told = []
    found = leave_one_out_of(stores[name]).search(QUERIES, UNKNOWN, told.append)
    first = np.concatenate([context for k, context in asked if k == K])
    distinct = np.unique(grid_ops.contexts_of_grids(QUERIES).reshape(-1, 4), axis=0)
    np.testing.assert_array_equal(np.unique(first[first[:, 0] >= 0], axis=0), distinct)
    assert (first[:, 0] >= 0).sum() == len(distinct)
    assert len({k for k, _ in asked}) >= rounds and (rounds > 1 or {k for k, _ in asked} == {K})
    assert sum(told) == len(QUERIES) and len(told) > 5
    monkeypatch.undo()
    whole = leave_one_out_of(stores[name]).search(QUERIES, UNKNOWN)
    np.testing.assert_allclose(found.distance, whole.distance, atol=2e-6)  # whatever the size of a call


def test_an_image_is_left_out_by_its_name_wherever_a_code_differs(stores):
    """One cell off, its grid is not in the store; its name is, twice: what is left is what the others alone give."""
    altered = QUERIES.copy()
    altered[:, 1, 1] = (altered[:, 1, 1] + 1) % 3
    store = stores["twice"]
    names = [f"query/{i % 26}" for i in range(len(STORED["twice"]))]  # the last six are the first six again
    found = LeaveOneOut(store, names, retriever(store, "dense")).search(altered, names[:6])
    rest = [np.delete(STORED["twice"], [i, i + 26], 0) for i in range(6)]
    expected = [np.sort(away)[:K] for i in range(6) for away in oracle(altered[i : i + 1], rest[i])[0]]
    np.testing.assert_allclose(found.distance, expected, atol=2e-6)
    assert (leave_one_out_of(store).search(altered, UNKNOWN).distance < found.distance - 1e-3).any()


def test_record_holds_what_was_put_in():
    """Also -1, the largest code of the largest codebook, and a caption of any letters, or none."""
    rng = np.random.default_rng(0)
    codes, neighbors = rng.integers(0, 65_535, 12), rng.integers(-1, 65_535, (12, 3))
    codes[0], neighbors[0] = 65_534, (-1, 0, 65_534)
    for caption in ("", "één 🐱\n"):
        record = to_record(codes, neighbors, caption.encode())
        assert len(record) == 2 * 12 * (1 + 3) + len(caption.encode())
        ours = from_record(record, 12, 3)
        np.testing.assert_array_equal(ours[0], codes)
        np.testing.assert_array_equal(ours[1], neighbors)
        assert ours[2] == caption
        assert ours[0].dtype == ours[1].dtype == np.int32


SET_IMAGES = grids(23, 3)


def settings(**changes) -> NeighborSettings:
    fields = {
        "fingerprint": "tokenizer-a", "grid": GRID, "codebook_size": V, "k": K, "keys": "codebook", "search": "dense",
        "scann": ScannOptions(), "storage": "float32", "datastore": "store-a", "store_images": 20, "source": "noise",
        "split": "train", "num_images": 23, "shard_size": 10, "store": "somewhere", "command": "test",
    }  # fmt: skip
    return NeighborSettings(**{**fields, **changes})


@pytest.fixture(scope="module")
def search(stores):
    leave_one_out = leave_one_out_of(stores["absent"])
    return lambda codes, names, captions, count=lambda n: None: leave_one_out.search(codes, names, count)


def build(directory: Path, search, /, **changes) -> NeighborSet:
    images = base.encoded(Grids(SET_IMAGES), "noise/{}")
    return writer.build_neighbor_set(directory, images, search, settings(**changes))


@pytest.fixture(scope="module")
def whole(search, tmp_path_factory) -> NeighborSet:
    return build(tmp_path_factory.mktemp("sets") / "whole", search)


@pytest.fixture
def copied(whole, tmp_path) -> NeighborSet:
    """A copy to damage."""
    for name, data in base.contents(whole.directory).items():
        (tmp_path / name).write_bytes(data)
    return NeighborSet.open(tmp_path)


def test_a_set_reads_as_it_was_searched(whole, search):
    """In any order, from Grain's threads; cells without a context have no neighbours."""
    expected = np.full((23, CELLS, K), -1)
    found = search(SET_IMAGES, [f"noise/{i}" for i in range(23)], ())
    expected[:, grid_ops.positions_with_context(*GRID)] = found.code.reshape(23, PATCHES, K)
    dataset = grain.MapDataset.source(whole).map_with_index(lambda i, x: {**x, "number": i}).shuffle(seed=0).repeat(3)
    options = grain.ReadOptions(num_threads=16, prefetch_buffer_size=16)
    read = list(dataset.to_iter_dataset(options))
    assert sorted(example["number"] for example in read) == [*range(3 * 23)]
    for example in read:
        i = example["number"] % 23  # Grain goes on counting in the next epoch
        np.testing.assert_array_equal(example["codes"], SET_IMAGES[i].reshape(-1))
        np.testing.assert_array_equal(example["neighbors"], expected[i])
        assert example["caption"] == f"een één · 🐱 {i}"
    assert (len(whole), whole.k, whole.grid, whole.codebook_size) == (23, K, GRID, V)
    assert whole.settings == settings()
    whole.verify()


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_killed_and_resumed_is_uninterrupted(whole, search, tmp_path, moment):
    """Stopped while a shard is searched: only whole shards are kept, and the end is the same, to the byte."""
    searches = []

    def failing(codes, names, captions, count):
        searches.append(len(codes))
        if len(searches) == moment:
            raise KeyboardInterrupt
        return search(codes, names, captions, count)

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, failing)
    expected = base.contents(whole.directory)
    left = {name: data for name, data in base.contents(tmp_path).items() if name != building.BUILDING}
    assert left == {name: expected[name] for name in sorted(expected)[1:moment]}  # sorted: the manifest comes first
    with pytest.raises(UserError, match="no finished neighbor set"):
        NeighborSet.open(tmp_path)
    build(tmp_path, failing, command="another command", store="moved")
    assert searches == [10, 10, 3][:moment] + [10, 10, 3][moment - 1 :]
    assert base.contents(tmp_path) == expected


def test_manifest_comes_last_and_a_whole_set_is_not_built_again(whole, search, tmp_path, monkeypatch):
    names, write_json = [], building.write_json

    def watched(path: Path, content: dict) -> None:
        names.append((path.name, len(list(path.parent.iterdir()))))
        write_json(path, content)

    for module in (building, shards):
        monkeypatch.setattr(module, "write_json", watched)
    build(tmp_path, search)
    assert names == [("building.json", 0), ("manifest.json", 1 + 3)]
    build(tmp_path, lambda *_: pytest.fail("searched again"))
    assert len(names) == 2
    assert base.contents(tmp_path) == base.contents(whole.directory)


@pytest.mark.parametrize(
    "changes",
    [
        {"fingerprint": "tokenizer-b"},
        {"datastore": "store-b"},
        {"store_images": 19},
        {"k": 5},
        {"keys": "latent"},
        {"search": "scann"},
        {"scann": ScannOptions(leaves=7)},
        {"storage": "bfloat16"},
        {"source": "other"},
        {"split": "valid"},
        {"num_images": 22},
        {"shard_size": 9},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_settings_touch_nothing(copied, search, changes):
    before = base.contents(copied.directory)
    with pytest.raises(UserError, match=f"neighbor set of other settings.*{next(iter(changes))}"):
        build(copied.directory, search, **changes)
    assert base.contents(copied.directory) == before


def test_a_set_from_before_storage_was_recorded_is_read_and_goes_on_if_by_scann(whole, copied, search, tmp_path):
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["settings"]["storage"], manifest["sha256"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    np.testing.assert_array_equal(NeighborSet.open(tmp_path)[22]["neighbors"], whole[22]["neighbors"])
    with pytest.raises(UserError, match=r"other settings: storage \('' there, 'float32' now\); choose another"):
        build(tmp_path, search)
    manifest["settings"]["search"] = "scann"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert len(build(tmp_path, search, search="scann", storage="")) == 23


def test_bad_images_are_left_out_and_listed(search, tmp_path):
    """Also where they are a whole shard; the others are as without them."""

    class Spoilt(Grids):
        def __getitem__(self, i: int) -> dict:
            if 10 <= i < 20:
                raise BadImage("gone")
            return super().__getitem__(i) | ({"caption": b" "} if i == 2 else {})

    arguments = (tmp_path, base.encoded(Spoilt(SET_IMAGES), "noise/{}"), search, settings())
    with pytest.raises(UserError, match="11 of 23 images cannot be read"):
        writer.build_neighbor_set(*arguments, SkipLimit(0.45))
    found = writer.build_neighbor_set(*arguments, SkipLimit(0.5))
    assert found.bad == [("noise/2", "it has no caption"), *((f"noise/{i}", "gone") for i in range(10, 20))]
    for i, example in zip([0, 1, *range(3, 10), 20, 21, 22], found, strict=True):
        np.testing.assert_array_equal(example["codes"], SET_IMAGES[i].reshape(-1))
    found.verify()


def test_damage_and_foreign_files_are_told(copied, search, tmp_path):
    shard = tmp_path / "neighbors-00001-of-00003.arrayrecord"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(UserError, match=f"{shard.name} has {len(data) - 1} bytes.*build_neighbors"):
        NeighborSet.open(tmp_path)
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match=f"{shard.name} is damaged"):
        NeighborSet.open(tmp_path).verify()
    (tmp_path / "manifest.json").write_text('{"format_version": 1, "settings": {}, "files": {}}')
    with pytest.raises(UserError, match="missing key"):
        NeighborSet.open(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match="other files"):
        build(tmp_path, search)


def test_bad_input_is_told_before_work(whole, search, tmp_path):
    with pytest.raises(UserError, match="it has 23"):
        build(tmp_path / "set", search, num_images=24)
    with pytest.raises(UserError, match="65535"):
        settings(codebook_size=65_536)
    with pytest.raises(UserError, match=r"neighbor set.*tokenizer-a.*tokenizer-b"):
        whole.require_tokenizer("tokenizer-b")
    whole.require_tokenizer("tokenizer-a")
    assert not (tmp_path / "set").exists()
