"""Damage that leaves a file readable: what is read is what was written, or one line says that it is not."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from arrag_jax.checksums import WORDS, all_finite, checksum
from arrag_jax.data.loader import make_loader
from arrag_jax.errors import UserError
from arrag_jax.mesh import make_mesh
from arrag_jax.models.checkpoint import load_model, save_model
from arrag_jax.models.conversion import convert
from arrag_jax.models.manifest import write_manifest
from arrag_jax.models.text import PromptTokenizer
from arrag_jax.models.weights import parameters
from arrag_jax.store.datastore import Datastore
from arrag_jax.training.checkpoint import Checkpoints, read_params
from arrag_jax.training.optimizer import make_optimizer
from arrag_jax.training.state import init_state
from arrag_jax.training.sums import _on_devices, sums_of_arrays
from helpers import stored, tiny, toy


def flipped(data: bytes, rng: np.random.Generator) -> bytes:
    """With one bit of one byte changed."""
    place = int(rng.integers(len(data)))
    return data[:place] + bytes([data[place] ^ (1 << int(rng.integers(8)))]) + data[place + 1 :]


def assert_found(path: Path, read, times: int, seed: int = 0) -> int:
    """Flips bits of a file: each time it reads as before, or is a UserError of one line. Returns how many were told."""
    before, whole, rng, told = path.read_bytes(), read(), np.random.default_rng(seed), 0
    for _ in range(times):
        path.write_bytes(flipped(before, rng))
        try:
            assert read() == whole, path
        except UserError as error:
            told += 1
            assert "\n" not in str(error)
    path.write_bytes(before)
    return told


@pytest.mark.slow
def test_files_of_a_store(tmp_path):
    folder = stored.build(tmp_path / "store", [f"a caption {i}" for i in range(12)], kept=True).directory

    def read() -> list:
        store = Datastore.open(folder)
        arrays = [x.tobytes() for x in (store.codes, store.records("latents"), store.codebook)]
        return [store.sources, store.captions, *arrays]

    for name in ("sources-00001-of-00003.txt", "captions-00000-of-00003.txt", "codebook.npz"):
        assert assert_found(folder / name, read, 40) == 40
    for kind in ("codes", "latents"):
        told = assert_found(folder / f"{kind}-00001-of-00003.arrayrecord", read, 40)
        assert kind == "latents" or told == 40  # where records leave space, their reader's own hashes see no change


def test_files_of_the_same_size_that_have_changed_places_are_found(tmp_path):
    folder = stored.build(tmp_path / "store").directory
    first, second = (folder / f"codes-0000{i}-of-00003.arrayrecord" for i in (0, 1))
    assert first.stat().st_size == second.stat().st_size
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    with pytest.raises(UserError, match=f"{first.name} is damaged .its SHA-256 is not the manifest's"):
        _ = Datastore.open(folder).codes


def bits_of(model) -> dict[str, bytes]:
    return {path: np.asarray(value[...]).tobytes() for path, value in parameters(model).items()}


@pytest.fixture
def export(tmp_path) -> Path:
    """A model folder as training writes it."""
    folder = tmp_path / "export"
    save_model(tiny.janus(), folder)
    PromptTokenizer.of_words(["a cat", "two dogs"]).save(folder)
    write_manifest(folder, {"tokenizer_fingerprint": "f", "command": "train"})
    return folder


@pytest.mark.slow
def test_weights_of_an_export(export):
    weights = export / "model.safetensors"
    header = int.from_bytes(weights.read_bytes()[:8], "little") + 8
    before, rng, known = weights.read_bytes(), np.random.default_rng(0), bits_of(load_model(export))
    for place in rng.integers(header, len(before), 12):
        weights.write_bytes(before[:place] + bytes([before[place] ^ 4]) + before[place + 1 :])
        with pytest.raises(UserError, match=r"model\.safetensors is damaged: .* is not what was written"):
            load_model(export)
    weights.write_bytes(before)
    assert bits_of(load_model(export)) == known


def test_the_small_files_of_an_export(export):
    read = lambda: PromptTokenizer.load(export).tokenizer.to_str()  # noqa: E731
    assert assert_found(export / "tokenizer.json", read, 20) == 20
    assert assert_found(export / "config.json", read, 20) == 20


def test_an_export_from_before_tensors_had_sums_goes_by_its_manifest(export):
    weights = export / "model.safetensors"
    save_file(load_file(weights), weights)
    write_manifest(export, {"tokenizer_fingerprint": "f"})
    known, data = bits_of(load_model(export)), weights.read_bytes()
    assert known == bits_of(tiny.janus())
    weights.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged: its SHA-256 is not the manifest's"):
        load_model(export)


@pytest.mark.slow
def test_a_converted_checkpoint_is_checked_as_well(export, tmp_path):
    convert(export, tmp_path / "new", "janus")
    weights = tmp_path / "new" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    with pytest.raises(UserError, match="is not what was written"):
        load_model(tmp_path / "new")
    with pytest.raises(UserError, match="is not what was written"):
        convert(tmp_path / "new", tmp_path / "newer", "ours")
    assert not (tmp_path / "newer").exists()


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_refused(tmp_path, value):
    model = tiny.janus()
    weight = parameters(model)["gen_head.layers.1.weight"]
    weight.set_value(weight[...].at[1, 2].set(value))
    save_model(model, tmp_path / "model")
    message = r"gen_head\.vision_head\.weight in .*model\.safetensors holds NaN or infinite numbers"
    for dtype in ("float32", "bfloat16", "float16"):
        with pytest.raises(UserError, match=message):
            load_model(tmp_path / "model", dtype)
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "model", tmp_path / "new", "ours")


def test_numbers_too_large_for_the_dtype_asked_for_are_refused(tmp_path):
    model = tiny.janus()
    weight = parameters(model)["gen_head.layers.1.weight"]
    weight.set_value(weight[...].at[1, 2].set(1e5))
    save_model(model, tmp_path)
    load_model(tmp_path, "bfloat16")
    with pytest.raises(UserError, match="has numbers too large for float16; choose dtype float32 or bfloat16"):
        load_model(tmp_path, "float16")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A toy run with a checkpoint, and functions that restore it and read its parameters."""
    workdir, task, config = tmp_path_factory.mktemp("run"), toy.ToyTask(), toy.toy_config(ema_decay=0.5)
    optimizer, mesh = make_optimizer(config.optimizer, config.steps), make_mesh(config.mesh)
    _, _, state = init_state(task, optimizer, config, mesh)
    data = make_loader(task.train_source(), config.batch_size, config.seed)
    with Checkpoints(workdir, task.best_metric) as checkpoints:
        checkpoints.save(1, state, data, {"eval/error": 0.5})

    def restore(folder: Path) -> tuple:
        loader = make_loader(task.train_source(), config.batch_size, config.seed)
        with Checkpoints(folder, task.best_metric) as checkpoints:
            found = checkpoints.restore(state, loader)
        return {path: x.tobytes() for path, x in toy.by_path(found).items()}, str(loader.get_state())

    def params(folder: Path) -> tuple:
        step, found = read_params(folder, state.params, task.best_metric)
        return step, {path: x.tobytes() for path, x in toy.by_path(found).items()}

    return workdir, restore, params


@pytest.mark.slow
def test_a_checkpoint_of_training(run, tmp_path):
    """Flips in every one of its files; those of the arrays' bytes are all found."""
    workdir, restore, params = run
    folder, told, larger = Path(shutil.copytree(workdir, tmp_path / "run")), 0, 0
    assert (folder / "checkpoints" / "1" / "sums" / "metadata").is_file()
    for seed, path in enumerate(sorted(x for x in (folder / "checkpoints" / "1").rglob("*") if x.is_file())):
        if path.stat().st_size:
            told += assert_found(path, lambda: (restore(folder), params(folder)), 3, seed)
        if "/d/" in str(path) and path.stat().st_size > 100_000:
            larger += 1
            assert assert_found(path, lambda: (restore(folder), params(folder)), 6, seed) == 6
    assert larger and told


@pytest.mark.slow
def test_a_checkpoint_from_before_sums_is_restored(run, tmp_path):
    workdir, restore, params = run
    folder = Path(shutil.copytree(workdir, tmp_path / "run"))
    shutil.rmtree(folder / "checkpoints" / "1" / "sums")
    assert restore(folder) == restore(workdir) and params(folder) == params(workdir)


@pytest.mark.slow
def test_sums_of_arrays_know_each_bit_and_no_mesh():
    rng = np.random.default_rng(0)
    values = {
        "a": rng.normal(size=(8, 6, 2)).astype(np.float32), "b": rng.integers(0, 99, 40).astype(np.int8),
        "c": np.float32(3.0), "d": rng.normal(size=(16, 4)).astype(jnp.bfloat16), "e": np.arange(4) > 1,
    }  # fmt: skip
    sums = sums_of_arrays({name: jnp.asarray(value) for name, value in values.items()})
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = {
        name: jax.device_put(x, jax.NamedSharding(mesh, jax.P("x" if np.ndim(x) and not len(x) % 4 else None)))
        for name, x in values.items() if np.ndim(x)
    }  # fmt: skip
    assert sums_of_arrays(spread) == {name: sums[name] for name in spread}
    for name, x in spread.items():  # as on other devices than CPUs
        assert tuple(map(int, _on_devices(x))) == sums[name]
    for name, value in values.items():
        for _ in range(5):
            other = np.frombuffer(flipped(np.asarray(value).tobytes(), rng), np.asarray(value).dtype)
            if value.dtype != bool:
                assert sums_of_arrays({name: jnp.asarray(other.reshape(np.shape(value)))}) != {name: sums[name]}
    for swapped in (values["a"][::-1], values["a"][:, ::-1], values["a"][..., ::-1]):
        assert sums_of_arrays({"a": jnp.asarray(swapped)}) != {"a": sums["a"]}


@pytest.mark.parametrize("size", [0, 1, 7, 8 * WORDS - 1, 8 * WORDS, 20 * WORDS + 3])
def test_a_checksum_knows_each_bit_and_the_order(size):
    rng = np.random.default_rng(size)
    data = rng.integers(0, 256, size, np.uint8)
    assert checksum(data) == checksum(data.copy()) != checksum(np.append(data, np.uint8(0)))
    for _ in range(20 if size else 0):
        changed = np.frombuffer(flipped(data.tobytes(), rng), np.uint8)
        assert checksum(changed) != checksum(data)
    if size > 8 * WORDS:
        moved = data.copy()
        moved[:64], moved[64:128] = data[64:128], data[:64]
        assert checksum(moved) != checksum(data)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32, np.float64])
def test_what_is_finite(dtype):
    value = np.full((300, 1000), jnp.finfo(dtype).max, dtype)
    assert all_finite(value) and all_finite(-value) and all_finite(value[:0]) and all_finite(np.arange(3))
    for bad in (np.nan, np.inf, -np.inf):
        value[299, 7] = bad
        assert not all_finite(value) and not all_finite(value.T)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4200000000\n"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "manifest.json"])
def test_a_pointer_of_git_lfs_is_told(export, name):
    if name != "manifest.json":
        (export / "manifest.json").unlink()
    (export / name).write_text(POINTER)
    with pytest.raises(UserError, match=rf"{name} is not the file itself but a pointer of Git LFS to it; fetch it"):
        (load_model if name != "tokenizer.json" else PromptTokenizer.load)(export)


@pytest.mark.parametrize("load", [load_model, PromptTokenizer.load])
def test_what_is_no_folder_is_told_with_how_an_id_of_the_hub_is_written(tmp_path, monkeypatch, load):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"is no folder here; .* write hf:deepseek-ai/Janus-Pro-1B"):
        load("deepseek-ai/Janus-Pro-1B")
    with pytest.raises(UserError, match=r"is an address; .*write hf:OWNER/NAME"):
        load("https://huggingface.co/deepseek-ai/Janus-Pro-1B")
    with pytest.raises(UserError, match=r"is no id of the hub; write hf:OWNER/NAME"):
        load("hf://a/b")
    with pytest.raises(UserError, match="is no checkpoint folder: it is not there"):
        load(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file is a file; give the checkpoint's folder"):
        load(tmp_path / "file")


def test_shards_without_their_index_and_an_index_without_its_shards(export):
    weights = export / "model.safetensors"
    weights.rename(export / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=r"model-00001-of-00002\.safetensors but not model\.safetensors\.index\.json"):
        load_model(export)
    for name, message in (
        ("model-00002-of-00002.safetensors", "is named by its index but is not there"),
        ("../model-00001-of-00002.safetensors", "not the name of a file of weights beside it"),
    ):
        (export / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
        with pytest.raises(UserError, match=message):
            load_model(export)
