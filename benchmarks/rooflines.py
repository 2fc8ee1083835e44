"""Peak rates of devices, and the least time that a computation takes at them: its roofline."""

import os
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from decode import bandwidth

from arrag_jax.costs import costs_of
from arrag_jax.topology import CHIPS

# NVIDIA's data sheets of the H100, H200 and A100 Tensor Core GPU: dense bfloat16 operations per second, and bytes per
# second of the main memory, by the name that JAX gives to a device. TPUs: see ``arrag_jax.topology``.
GPUS = {
    "NVIDIA H200": (989e12, 4.8e12),
    "NVIDIA H100 80GB HBM3": (989e12, 3.35e12),
    "NVIDIA H100 NVL": (835e12, 3.9e12),
    "NVIDIA H100 PCIe": (756e12, 2.0e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 2.039e12),
    "NVIDIA A100 80GB PCIe": (312e12, 1.935e12),
    "NVIDIA A100-SXM4-40GB": (312e12, 1.555e12),
    "NVIDIA A100-PCIE-40GB": (312e12, 1.555e12),
}
SIDE = {"cpu": 1024}  # of the matrices whose product is timed, by platform
LARGE_SIDE, COPIED_BYTES, TURNS = 8192, 2**30, 5


class Rates(NamedTuple):
    """What a device can do at most.

    Attributes:
      device: its name.
      flops: operations per second.
      bytes: bytes per second of its main memory.
      source: where the two numbers come from.
    """

    device: str
    flops: float
    bytes: float
    source: str

    def least_seconds(self, flops: float, moved: float) -> tuple[float, str]:
        """Returns the least time of a computation, and which rate it comes from."""
        times = {"arithmetic": flops / self.flops, "memory": moved / self.bytes}
        return max(times.values()), max(times, key=times.__getitem__)


def rates_of(device: jax.Device, dtype: str) -> Rates:
    """Returns the peak rates of a device by its data sheet; those of an unknown one are measured with this dtype."""
    known = {chip.kind: (chip.flops, chip.bandwidth) for chip in CHIPS.values()} | GPUS
    if device.device_kind in known:
        return Rates(device.device_kind, *known[device.device_kind], "data sheet, bfloat16")
    side = SIDE.get(device.platform, LARGE_SIDE)
    square = jnp.ones((side, side), dtype)
    flops = 2 * side**3 / _best(jax.jit(lambda x: x @ x), square)
    if device.platform == "cpu":
        return Rates(cpu_name(), flops, bandwidth() * 1e9, f"measured: a product in {dtype}, a sum over 2 GiB")
    numbers = jnp.ones(COPIED_BYTES // 4, jnp.float32)
    moved = 2 * COPIED_BYTES / _best(jax.jit(lambda x: x + 1), numbers)
    return Rates(device.device_kind, flops, moved, f"measured: a product in {dtype}, a sum of 1 GiB and a number")


def cpu_name() -> str:
    """Returns the number of CPU cores and, where Linux tells it, the processor's name."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", path.read_text() if path.exists() else "")
    return f"{os.cpu_count()} CPU cores{f' ({found[1]})' if found else ''}"


def _best(work: Any, argument: jax.Array) -> float:
    """Returns the seconds of the fastest of some calls; the first one, which compiles, does not count."""
    times = []
    for _ in range(TURNS + 1):
        start = time.perf_counter()
        jax.block_until_ready(work(argument))
        times.append(time.perf_counter() - start)
    return min(times[1:])


def flops_of(lowered: jax.stages.Lowered) -> float:
    """Returns the operations of the matrix products and convolutions of a program, the same on every device.

    The body of a loop counts as often as the loop runs if that is a constant, else once.
    """
    return costs_of(lowered.compiler_ir("hlo").as_hlo_module().to_string()).flops


def bytes_of(tree: Any) -> int:
    """Returns the bytes of all arrays of a pytree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
