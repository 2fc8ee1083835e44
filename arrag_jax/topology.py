"""Compiles programs for TPUs that this machine does not have, and says what they need of them.

The package ``libtpu`` holds the whole TPU compiler, which needs no TPU. ``--topology`` of a command compiles the real
program of its config for such a topology and runs nothing.
"""

import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from arrag_jax.command import Flag
from arrag_jax.config import MeshConfig
from arrag_jax.costs import costs_of
from arrag_jax.errors import UserError
from arrag_jax.files import write_json
from arrag_jax.mesh import make_mesh

GIB = 2**30
RECORD = "topology.json"
# The compiler's two ways to say that a program does not fit: (needed, unit, there, unit).
OUT_OF_MEMORY = r"(?:Used |temporaries \()([0-9.]+)([KMGT])\)?(?: of| exceeds available HBM \() ?([0-9.]+)([KMGT])"
TOPOLOGY = Flag("compile for a TPU topology such as v5e:4x4, print what a chip needs, and do nothing else", "")


class Chip(NamedTuple):
    """One TPU chip.

    Attributes:
      kind: the name that JAX gives to its devices.
      dimensions: of its topologies.
      hbm_bytes: main memory that a program can use.
      flops: bfloat16 operations per second.
      bandwidth: bytes per second of the main memory.
      link_bandwidth: bytes per second that it can send to its neighbours, over all links together.
    """

    kind: str
    dimensions: int
    hbm_bytes: int
    flops: float
    bandwidth: float
    link_bandwidth: float


# Peak rates: the tables of https://cloud.google.com/tpu/docs/v5e, …/v5p and …/v6e, whose "ICI bandwidth" counts both
# directions. Memory: what the compiler of libtpu 0.0.42 leaves to a program ("of …G hbm" in its message).
CHIPS = {
    "v5e": Chip("TPU v5 lite", 2, int(15.75 * GIB), 197e12, 819e9, 200e9),
    "v5p": Chip("TPU v5", 3, int(95.74 * GIB), 459e12, 2765e9, 600e9),
    "v6e": Chip("TPU v6 lite", 2, int(31.25 * GIB), 918e12, 1640e9, 400e9),
}


class Topology(NamedTuple):
    """A TPU slice: its name such as "v5e:4x4", its chip and its devices, for which programs can be compiled."""

    name: str
    chip: Chip
    devices: Sequence[Any]

    def mesh(self, config: MeshConfig) -> Mesh:
        """Returns the mesh of a config over all chips."""
        return make_mesh(config, devices=self.devices)

    def one_chip(self) -> Mesh:
        """Returns a mesh of one chip."""
        return make_mesh(MeshConfig(1, 1), devices=self.devices)


class Program(NamedTuple):
    """A program to compile.

    Attributes:
      name: a word for the table.
      lower: returns the program, lowered for the topology (``jax.stages.Lowered``).
      held: bytes per chip of what it is given, by name, such as {"parameters": …, "optimizer": …}.
      steps: how often a loop of the program runs whose rate is wanted, such as the positions of a drawn image; its
        figures are also given per step.
    """

    name: str
    lower: Callable[[], Any]
    held: dict[str, int]
    steps: int = 1


def open_topology(name: str) -> Topology:
    """Returns a topology by its name, "v5e:4x4", "v6e:16x16" or "v5p:2x2x4".

    Raises:
      UserError: if there is no such topology, or ``libtpu`` is not installed.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", name)
    if found is None or found[1] not in CHIPS or found[2].count("x") + 1 != CHIPS[found[1]].dimensions:
        raise UserError(f"--topology={name} is unknown; give one such as v5e:4x4, v6e:16x16 or v5p:2x2x4")
    # The compiler would ask a TPU's host for its place, and allows one process at a time on a machine with a TPU.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:  # jax and its plugin raise several types
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--topology={name} cannot be compiled for ({reason}); the compiler is in the extra: "
            "pip install 'arrag_jax[tpu-aot]'"
        ) from error
    return Topology(name, CHIPS[found[1]], described.devices)


def held_bytes(tree: Any) -> int:
    """Returns the bytes that one chip holds of arrays that are given as shapes with shardings."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return sum(_bytes(leaf) for leaf in leaves)


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    size = leaf.dtype.itemsize
    for length in shape:
        size *= length
    return size


def measured(program: Program, chip: Chip) -> dict[str, Any]:
    """Returns the figures of a program per chip, under the keys of ``topology.json``.

    ``fits`` is False if the program needs more memory than a chip has; ``over_bytes`` says how much more. The compiler
    then gives no program, and the other figures are absent.
    """
    lowered = program.lower()
    start = time.perf_counter()
    figures: dict[str, Any] = {"name": program.name, "hbm_bytes": chip.hbm_bytes, "held_bytes": program.held}
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(OUT_OF_MEMORY, str(error))
        if used is None:
            raise
        unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
        peak = int(float(used[1]) * unit[used[2]])
        over = peak - int(float(used[3]) * unit[used[4]])
        seconds = time.perf_counter() - start
        return figures | {"fits": False, "peak_bytes": peak, "over_bytes": over, "compile_seconds": seconds}
    seconds, memory, costs = time.perf_counter() - start, compiled.memory_analysis(), costs_of(compiled.as_text())
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    # The chip also holds what this program does not read, such as the tokenizer while codes are drawn.
    held = max(memory.argument_size_in_bytes, sum(program.held.values()))
    peak = held + memory.temp_size_in_bytes + new + memory.generated_code_size_in_bytes
    figures |= {
        "fits": peak <= chip.hbm_bytes,
        "over_bytes": max(0, peak - chip.hbm_bytes),
        "peak_bytes": peak,
        "activation_bytes": memory.temp_size_in_bytes,
        "flops": costs.flops,
        "bytes": costs.bytes,
        "link_bytes": costs.link_bytes,
        "collectives": dict(costs.collectives),
        "arithmetic_ms": 1e3 * costs.flops / chip.flops,
        "memory_ms": 1e3 * costs.bytes / chip.bandwidth,
        "interconnect_ms": 1e3 * costs.link_bytes / chip.link_bandwidth,
        "steps": program.steps,
        "compile_seconds": seconds,
    }
    return figures


def table(figures: dict[str, Any]) -> str:
    """Returns the figures of a program as lines for a console."""
    held = [f"{name} {size / GIB:.2f}" for name, size in figures["held_bytes"].items()]
    rows = [
        ("held, GiB", ", ".join(held)),
        ("peak, GiB", f"{figures['peak_bytes'] / GIB:.2f} of {figures['hbm_bytes'] / GIB:.2f}"),
    ]
    if "flops" in figures:
        times = {name: figures[f"{name}_ms"] for name in ("arithmetic", "memory", "interconnect")}
        rows += [
            ("activations and other temporaries, GiB", f"{figures['activation_bytes'] / GIB:.2f}"),
            ("TFLOP", f"{figures['flops'] / 1e12:.3f}"),
            ("memory traffic, GB", f"{figures['bytes'] / 1e9:.2f}"),
            ("sent to other chips, GB", f"{figures['link_bytes'] / 1e9:.3f}"),
            ("collectives", ", ".join(f"{n} {name}" for name, n in figures["collectives"].items()) or "none"),
            ("at least, ms", ", ".join(f"{name} {ms:.1f}" for name, ms in times.items())),
            ("bound by", max(times, key=times.__getitem__)),
        ]
        if figures["steps"] > 1:
            rows.append(("at least per step, ms", f"{max(times.values()) / figures['steps']:.3f}"))
    rows.append(("compiled in, s", f"{figures['compile_seconds']:.0f}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join([f"{figures['name']}, per chip", *(f"  {name:{width}}  {text}" for name, text in rows)])


def dry_run(topology: Topology, programs: Sequence[Program], workdir: Path) -> int:
    """Compiles the programs, prints their tables and writes ``topology.json``; returns the exit code.

    It is 1 if a program does not fit into a chip's memory, and the last line then says by how much.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    results, lines = [], []
    for program in programs:
        figures = measured(program, topology.chip)
        print(table(figures), flush=True)
        results.append(figures)
        if not figures["fits"]:
            over = figures["over_bytes"] / GIB
            lines.append(f"{program.name} does not fit {topology.name}: it needs {over:.2f} GiB more than a chip has")
    first = results[0] if len(results) == 1 else {}
    record = {"topology": topology.name, "chips": len(topology.devices), **first, "programs": results}
    write_json(workdir / RECORD, record)
    for line in lines:
        print(line)
    return 1 if lines else 0
