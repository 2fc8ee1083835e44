"""The mesh: its shapes, where leaves live, how batches are put on it, and runs of several processes."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from arrag_jax.config import MeshConfig, OptimizerConfig
from arrag_jax.errors import UserError
from arrag_jax.mesh import (
    check_batch_size,
    make_mesh,
    partition_spec,
    put_batch,
    put_everywhere,
    start_distributed,
    state_shardings,
)
from arrag_jax.training.loop import train
from arrag_jax.training.optimizer import make_optimizer
from helpers import children
from helpers.toy import ToyTask, losses, toy_config


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), {"data": 8, "fsdp": 1}),
        (MeshConfig(data=-1, fsdp=4), {"data": 2, "fsdp": 4}),
        (MeshConfig(data=1, fsdp=-1), {"data": 1, "fsdp": 8}),
        (MeshConfig(data=1, fsdp=2), {"data": 1, "fsdp": 2}),
    ],
)
def test_a_free_axis_takes_every_device_left(config, shape):
    assert dict(make_mesh(config).shape) == shape


@pytest.mark.parametrize("shape", [(-1, -1), (3, 1), (-1, 3), (16, 1), (0, 1), (-2, 1)])
def test_a_mesh_that_does_not_fit_is_refused(shape):
    with pytest.raises(UserError, match="mesh"):
        make_mesh(MeshConfig(*shape))


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh asks a TPU chip about itself."""

    id: int
    coords: tuple[int, int, int]
    process_index: int = 0
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


@dataclasses.dataclass(frozen=True)
class ChipOfSlices(Chip):
    """A chip of several slices; one of a single slice that is compiled for knows no number of it."""

    slice_index: int = 0


def test_chips_of_one_slice_need_no_number_of_it():
    chips = [Chip(4 * x + y, (x, y, 0)) for x in range(2) for y in range(4)]
    assert {chip.id for chip in make_mesh(MeshConfig(2, 4), devices=chips).devices.flat} == set(range(8))


@pytest.mark.parametrize(("data", "fsdp"), [(2, 8), (4, 4), (16, 1), (-1, 2)])
def test_parameters_are_split_within_a_slice(data, fsdp):
    chips = [
        ChipOfSlices(8 * n + 4 * x + y, (x, y, 0), slice_index=n) for n in range(2) for x in range(2) for y in range(4)
    ]
    devices = make_mesh(MeshConfig(data, fsdp), devices=chips).devices
    assert {chip.id for chip in devices.flat} == set(range(16))
    for row in devices:
        assert len({chip.slice_index for chip in row}) == 1
    with pytest.raises(UserError, match="data must be a multiple of the 2 slices"):
        make_mesh(MeshConfig(1, 16), devices=chips)


def test_batches_must_split_evenly():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    check_batch_size(16, mesh)
    with pytest.raises(UserError, match="batch_size=12 must be a multiple of the mesh's 8 devices"):
        check_batch_size(12, mesh)
    check_batch_size(32, mesh, accumulate=4)
    with pytest.raises(UserError, match="batch_size=16 must be a multiple of the mesh's 8 devices times accumulate=4"):
        check_batch_size(16, mesh, accumulate=4)


def test_every_spec_divides_its_leaf_and_shards_what_is_large():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    rng = np.random.default_rng(0)
    for _ in range(300):
        shape = tuple(int(size) for size in rng.choice([3, 64, 66, 512, 513], size=rng.integers(0, 4)))
        path = str(rng.choice(["layers/0/kernel", "embed_tokens/embedding", "codebook"]))
        spec = partition_spec(path, shape, mesh)
        split = [axis for axis, name in enumerate(spec) if name == "fsdp"]
        assert len(split) <= 1 and all(shape[axis] % 4 == 0 for axis in split)
        divisible = [size for size in shape if size % 4 == 0]
        should_split = len(shape) > 1 and np.prod(shape) >= 2**16 and divisible and path != "codebook"
        assert bool(split) == bool(should_split), (path, shape)
        if split and path == "layers/0/kernel":
            assert shape[split[0]] == max(divisible)


def test_rules_come_before_the_default():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    assert partition_spec("params/layers/0/kernel", (4096, 64), mesh) == P("fsdp", None)
    assert partition_spec("params/embed_tokens/embedding", (4096, 64), mesh) == P(None, "fsdp")
    assert partition_spec("params/embed_tokens/embedding", (4096, 66), mesh) == P("fsdp", None)
    assert partition_spec("params/codebook", (4096, 64), mesh) == P()


def test_optimizer_state_lives_where_its_parameter_does():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    params = {"layers": {0: {"kernel": jnp.ones((256, 512))}}, "embed": {"embedding": jnp.ones((512, 256))}}
    state = {"params": params, "optimizer": make_optimizer(OptimizerConfig(), 10).init(params)}
    specs = {}
    for path, sharding in jax.tree_util.tree_leaves_with_path(state_shardings(state, mesh)):
        specs.setdefault(path[-1].key if hasattr(path[-1], "key") else "count", set()).add(sharding.spec)
    assert specs == {"kernel": {P(None, "fsdp")}, "embedding": {P(None, "fsdp")}, "count": {P()}}


def test_put_batch_splits_rows_over_all_devices_and_loses_none():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    batch = {"x": np.arange(48, dtype=np.float32).reshape(16, 3)}
    for parts in (1, 2):
        placed = put_batch(batch, mesh, parts)
        assert [shard.data.shape for shard in placed["x"].addressable_shards] == [(parts, 2 // parts, 3)] * 8
        np.testing.assert_array_equal(placed["x"].reshape(16, 3), batch["x"])
    whole = put_everywhere(placed, mesh)
    assert all(np.array_equal(shard.data, placed["x"]) for shard in whole["x"].addressable_shards)


def test_one_process_needs_no_start_and_half_a_description_is_refused(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)
    start_distributed()
    assert jax.process_count() == 1
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES must be set"):
        start_distributed()


class StoppedTask(ToyTask):
    """Slow enough to be stopped: process 1 of its run gets SIGTERM at the first evaluation."""

    def __init__(self):
        super().__init__(pause=0.02)
        self._signalled = False

    def sample_callback(self, mesh):
        draw_samples = super().sample_callback(mesh)

        def paint_and_signal(model):
            if jax.process_index() == 1 and not self._signalled:
                self._signalled = True
                os.kill(os.getpid(), signal.SIGTERM)
            return draw_samples(model)

        return paint_and_signal


@pytest.mark.long
@pytest.mark.slow
def test_two_processes_stop_at_one_signal_and_one_process_goes_on_as_if_nothing_had_happened(tmp_path):
    """Noise included; both save the same step, and its checkpoint does not depend on their number."""
    command = [sys.executable, __file__, str(tmp_path / "parts")]
    processes = [
        subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for env in children.together(2, devices=2)
    ]
    train(CONFIG, ToyTask(), tmp_path / "whole")
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    stop = max(losses(tmp_path / "parts"))
    assert CONFIG.eval_every < stop < CONFIG.steps
    assert all(f"stopped and saved at step {stop}; run the same command again" in error for error in errors)
    train(CONFIG, ToyTask(), tmp_path / "parts")
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert list(whole) == list(parts) == list(range(1, CONFIG.steps + 1))
    np.testing.assert_allclose(list(parts.values()), list(whole.values()), rtol=1e-5)
    exported = [np.load(tmp_path / name / "export" / "weights.npz")["middle"] for name in ("whole", "parts")]
    np.testing.assert_allclose(exported[1], exported[0], atol=1e-5)


CONFIG = toy_config(mesh=MeshConfig(data=2, fsdp=2), steps=60, eval_every=20, checkpoint_every=100)

if __name__ == "__main__":
    start_distributed()
    assert jax.process_count() == 2
    train(CONFIG, StoppedTask(), Path(sys.argv[1]))
