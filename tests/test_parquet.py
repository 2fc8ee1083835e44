"""Parquet as an image source: the same images as files give, a row group at a time, and every fault by its reason."""

import itertools

import numpy as np
import pyarrow as pa
import pytest

from arrag_jax.config import BY_HABIT, ColumnsConfig, DataConfig, DatastoreConfig
from arrag_jax.data import parquet, sources
from arrag_jax.data.duplicates import without_copies
from arrag_jax.data.examples import BadImage
from arrag_jax.data.registry import open_source
from arrag_jax.errors import UserError
from arrag_jax.models.checkpoint import save_model
from arrag_jax.models.janus import VISION
from arrag_jax.store.datastore import Datastore
from arrag_jax.training.shared import RunImages
from helpers import hub_server, running, tables, tiny
from helpers.folders import built

SIZE = (8, 10)
PHOTOS = tables.scenes(11)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hub_server.served() as hub:
        hub_server.attach(monkeypatch, hub.address, tmp_path / "cache")
        yield hub


def forms(folder, photos, hub, ending="png") -> dict[str, str]:
    """The same photos in the same order as four sources."""
    half = len(photos) // 2
    for number, part in enumerate((photos[:half], photos[half:])):
        tables.write_parquet(folder / "set" / "data" / f"train-0000{number}-of-00002.parquet", part)
    hub.push("datasets/owner/set", hub_server.files_below(folder / "set"))
    return {
        "folder": str(tables.write_folder(folder / "folder", photos, ending)),
        "tar": str(tables.write_tar(folder / "one.tar", photos, ending)),
        "parquet": str(tables.write_parquet(folder / "one.parquet", photos)),
        "hub": "hf:datasets/owner/set",
    }


def examples(source: str, columns: ColumnsConfig = BY_HABIT) -> list[tuple[bytes, str]]:
    images = open_source(source, "", SIZE, captions=True, columns=columns).images("")
    return [(x["image"].tobytes(), x["caption"]) for x in (images[i] for i in range(len(images)))]


@pytest.mark.slow
def test_the_same_photos_in_any_form_give_the_same_store_and_the_same_training(tmp_path, hub):
    save_model(tiny.janus(parts=VISION), tmp_path / "model")
    stores, runs = {}, {}
    for name, source in forms(tmp_path, PHOTOS, hub).items():
        config = DatastoreConfig(
            str(tmp_path / "model"), source, batch_size=4, shard_size=5, indexes=(), captions=True
        )  # fmt: skip
        stores[name] = built(config, tmp_path / f"{name}-store")
        data = DataConfig(source, train_split="train[:-3]", eval_split="train[-3:]")
        runs[name] = RunImages(data, SIZE, bool)
    first, run = stores["folder"], runs["folder"]
    assert first.captions == [caption for _, _, caption in PHOTOS]
    for name, store in stores.items():
        for file in first.files:
            if not file.startswith("sources-"):
                assert (store.directory / file).read_bytes() == (first.directory / file).read_bytes(), (name, file)
        assert len(set(store.sources)) == len(PHOTOS)
        for images, expected in ((runs[name].train, run.train), (runs[name].held_out, run.held_out)):
            assert len(images) == len(expected)
            for i in range(len(images)):
                np.testing.assert_equal(images[i], expected[i])


@pytest.mark.long
def test_two_hundred_photos_in_any_form_give_the_same_store(tmp_path, hub, photos):
    tar = photos / "flickr8k_dev_224.tar"
    listed = sources.list_images(str(tar), captions=True)[:200]
    found = [(f"{i:05d}", sources.read_entry(photos, entry), entry.caption) for i, entry in enumerate(listed)]
    model = str(running.ROOT / "arrag_jax" / "assets" / "emoji_janus")
    stores = [
        built(DatastoreConfig(model, source, shard_size=64, captions=True, indexes=()), tmp_path / f"{name}-store")
        for name, source in forms(tmp_path, found, hub, "jpg").items()
    ]
    for store, file in itertools.product(stores[1:], stores[0].files):
        if not file.startswith("sources-"):
            assert (store.directory / file).read_bytes() == (stores[0].directory / file).read_bytes(), file


@pytest.mark.parametrize("words", [True, False])
def test_the_three_outputs_of_img2dataset_are_one_source(tmp_path, words):
    expected = [(x["image"].tobytes(), x["caption"]) for x in _decoded(PHOTOS)]
    for kind in ("files", "tar", "parquet"):
        folder = tables.img2dataset(tmp_path / kind, PHOTOS, 4, kind, words)
        assert examples(str(folder)) == expected, kind
    beside = sources.list_source(str(tmp_path / "parquet")).beside
    assert beside == {".json": 1, "rows without an image (failed_to_download)": 4}
    assert sources.list_source(str(tmp_path / "tar")).beside[".parquet"] == 1


def _decoded(photos):
    for _, data, caption in photos:
        yield {"image": sources.pixels.decode(data, SIZE), "caption": caption}


BYTES, WORDS = [data for _, data, _ in PHOTOS[:3]], ["a", "b", "c"]


@pytest.mark.parametrize(
    "columns, config, ids",
    [
        ({"image": BYTES, "caption": WORDS}, BY_HABIT, None),
        ({"jpg": pa.array(BYTES, pa.large_binary()), "TEXT": WORDS, "key": ["x", "a", "b"]}, BY_HABIT, ["x", "a", "b"]),
        ({"png": BYTES, "prompt": [["", "a"], ["b"], ["c"]], "key": ["x", "x", None]}, BY_HABIT, ["x", "x#1", None]),
        ({"image": ["1.png", "2.png", "3.png"], "jpg": BYTES, "text": WORDS}, BY_HABIT, None),
        (
            {"image": BYTES[::-1], "caption": ["x"] * 3, "photo": [{"bytes": x, "path": ""} for x in BYTES],
             "title": WORDS, "name": [7, 8, 9]},
            ColumnsConfig("photo", "title", "name"), ["7", "8", "9"],
        ),
    ],
)  # fmt: skip
def test_columns_are_found_by_habit_or_by_the_config(tmp_path, columns, config, ids):
    path = tables.write(tmp_path / "x.parquet", columns, rows=2)
    expected = [x["image"].tobytes() for x in _decoded(PHOTOS[:3])]
    assert examples(str(path), config) == list(zip(expected, WORDS, strict=True))
    found = [entry.id for entry in sources.list_source(str(path), columns=config).entries]
    wanted = [name or f"{i:09d}" for i, name in enumerate(ids or [None] * 3)]
    assert found == [f"x.parquet!{name}" for name in wanted]  # the order of the rows, not of the keys


def test_rows_give_their_reasons(tmp_path):
    grey = np.zeros((9, 9, 3), np.uint8)
    rows = {
        "good": BYTES[0], "cmyk": tables.png(grey, "CMYK", "JPEG"), "empty": b"", "text": b"no image",
        "none": None, "cut": BYTES[0][:60],
    }  # fmt: skip
    path = tables.write(tmp_path / "x.parquet", {"key": list(rows), "image": list(rows.values())}, rows=2)
    listing = sources.list_source(str(path))
    assert listing.beside == {"rows without an image": 1}
    images, reasons = sources.FileImages(tmp_path, listing.entries, SIZE), {}
    for i, entry in enumerate(listing.entries):
        try:
            assert images[i]["image"].shape == (*SIZE, 3)
        except BadImage as error:
            reasons[entry.id.partition("!")[2]] = str(error)
    assert reasons.keys() == {"empty", "text", "cut"}
    assert reasons["empty"] == "empty file" and reasons["text"] == "not an image that PIL reads"


def test_a_damaged_row_group_costs_its_own_rows_alone(tmp_path):
    noise = np.random.default_rng(0)
    images = [noise.bytes(1000) for _ in range(12)]  # nothing that a codec could shorten
    path = tables.write(tmp_path / "x.parquet", {"image": pa.array(images)}, rows=3)
    whole = [sources.read_entry(tmp_path, entry) for entry in sources.list_images(str(path))]
    assert whole == images
    cut = path.read_bytes()
    start = cut.index(images[4])
    path.write_bytes(cut[: start - 40] + bytes(40) + cut[start:])  # the head of a page
    listed = sources.list_images(str(path))
    faults = [bool(entry.fault) for entry in listed]
    assert len(listed) == 12 and 0 < sum(faults) <= 3 and all("row group 1 cannot be read" in x.fault for x in
                                                               itertools.compress(listed, faults))  # fmt: skip
    for i, entry in enumerate(listed):
        if not entry.fault:
            assert sources.read_entry(tmp_path, entry) == images[i]


def test_any_damage_is_told_as_a_fault_or_in_one_line(tmp_path):
    noise = np.random.default_rng(0)
    path = tables.write_parquet(tmp_path / "x.parquet", [(str(i), noise.bytes(60), "words") for i in range(6)], rows=2)
    whole, outcomes = path.read_bytes(), set()
    for _ in range(80):
        data = bytearray(whole)
        for place in noise.integers(0, len(data), noise.integers(1, 4)):
            data[place] = noise.integers(256)
        path.unlink()  # pyarrow may still have the old one open
        path.write_bytes(data)
        try:
            entries = sources.list_images(str(path), captions=True)
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            outcomes.add("told")
            continue
        for entry in entries:
            try:
                sources.read_entry(tmp_path, entry)
                outcomes.add("read")
            except BadImage:
                outcomes.add("bad")
    assert {"told", "read"} <= outcomes  # not only one of them


@pytest.mark.parametrize(
    "columns, config, reason",
    [
        ({"picture": BYTES, "n": [1, 2, 3]}, BY_HABIT, r"no column of images; .* are picture \(binary\), n \(int64\)"),
        ({"image": [[x] for x in BYTES]}, BY_HABIT, r"no column of images; its columns are image \(list<"),
        ({"image": [[x] for x in BYTES]}, ColumnsConfig("image"), r"image \(config.columns.image\) holds list<.*, not"),
        ({"image": BYTES}, ColumnsConfig("photo"), r"no column photo \(config.columns.image\); its columns are image"),
        ({"image": BYTES}, ColumnsConfig(caption="title"), r"has no column title \(config.columns.caption\)"),
        ({f"c{i}": [i] for i in range(3000)}, BY_HABIT, r"description takes .*: too many columns or row groups"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_do_is_told_with_its_columns(tmp_path, monkeypatch, columns, config, reason):
    monkeypatch.setattr(parquet, "FOOTER", 2**16)  # a million columns take minutes to write
    tables.write(tmp_path / "x.parquet", columns)
    for source in (tmp_path / "x.parquet", tmp_path):
        with pytest.raises(UserError, match=reason) as told:
            sources.list_source(str(source), captions=True, columns=config)
        assert "\n" not in str(told.value) and len(str(told.value)) < 1000


@pytest.mark.parametrize("bytes_left", [0, 7, 500, -1, -9])
def test_a_file_that_is_cut_off_is_told(tmp_path, bytes_left):
    path = tables.write_parquet(tmp_path / "x.parquet", PHOTOS)
    path.write_bytes(path.read_bytes()[:bytes_left])
    with pytest.raises(UserError, match=r"source=.*x.parquet: x.parquet cannot be read: not a whole Parquet file"):
        sources.list_source(str(path))
    tables.write_parquet(tmp_path / "y.parquet", PHOTOS)
    listed = sources.list_images(str(tmp_path))  # beside others it is one bad image, as a damaged tar is
    assert [entry.id for entry in listed if entry.fault] == ["x.parquet"] and len(listed) == len(PHOTOS) + 1


def test_memory_holds_row_groups_and_not_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "KEPT", 0)
    monkeypatch.setattr(parquet, "_GROUPS", parquet._Groups())  # other tests' groups would be forgotten in between
    noise, group = np.random.default_rng(0), 4 * 2**18
    path = tables.write(tmp_path / "x.parquet", {"image": [noise.bytes(2**18) for _ in range(80)]}, rows=4)
    base, most = pa.total_allocated_bytes(), 0
    entries = sources.list_images(str(path))
    for entry in entries:
        sources.read_entry(tmp_path, entry)
        most = max(most, pa.total_allocated_bytes() - base)
    assert len(entries) == 80 and group <= most <= 4 * group < path.stat().st_size / 4


def test_a_failure_that_may_pass_is_no_bad_image(tmp_path, monkeypatch):
    path = tables.write_parquet(tmp_path / "x.parquet", PHOTOS)
    entries = sources.list_images(str(path))

    def failing(*_, **options):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="run the same command again") as caught:
        patch.setattr("pyarrow.parquet.ParquetFile", failing)
        sources.read_entry(tmp_path, entries[0])
    assert not isinstance(caught.value, BadImage)
    assert sources.read_entry(tmp_path, entries[0]) == PHOTOS[0][1]  # it is read again, not remembered
    path.unlink()
    with pytest.raises(BadImage, match="No such file"):
        sources.read_entry(tmp_path, entries[9])


def test_equal_rows_are_taken_once_and_changed_ones_are_told(tmp_path):
    path = tables.write(tmp_path / "x.parquet", {"image": [BYTES[0], BYTES[1], BYTES[0], BYTES[2], BYTES[1]]}, rows=2)
    entries = without_copies(tmp_path, sources.list_images(str(path)))
    faults = ["", "", "duplicate of x.parquet!000000000", "", "duplicate of x.parquet!000000001"]
    assert [entry.fault for entry in entries] == faults
    tables.write(path, {"image": BYTES[1:2]}, rows=2)
    for entry, reason in ((entries[0], "size is not what it was"), (entries[3], "row is not there any more")):
        with pytest.raises(BadImage, match=reason):
            sources.read_entry(tmp_path, entry)


@pytest.mark.slow
def test_a_store_keeps_its_columns_for_later_additions(tmp_path):
    save_model(tiny.janus(parts=VISION), tmp_path / "model")
    columns = {"image": BYTES[::-1], "photo": BYTES, "title": WORDS}
    path = tables.write(tmp_path / "x.parquet", columns)
    config = DatastoreConfig(
        str(tmp_path / "model"),
        str(path),
        batch_size=2,
        shard_size=2,
        indexes=(),
        columns=ColumnsConfig("photo", "title"),
    )
    store = built(config, tmp_path / "store")
    assert store.settings.columns == config.columns
    assert Datastore.open(store.directory).sources == [f"x.parquet!{i:09d}" for i in range(3)]
