"""Environments of the processes that tests start: few devices, and compiled as the tests themselves are."""

import os
import socket
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
# What runs in a test is small: compiling is what takes the time. Without optimization it takes a third less, with XLA's
# older code generator less than half of that, and with one LLVM module per program instead of 32 a tenth less again.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)


def alone(devices: int = 1) -> dict[str, str]:
    """Of one process on so many virtual devices."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS))),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count={devices}",
    }


def together(processes: int, devices: int = 1) -> list[dict[str, str]]:
    """Of each process of one run on loopback, so many virtual devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    run = alone(devices) | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    return [run | {"JAX_PROCESS_ID": str(number)} for number in range(processes)]
