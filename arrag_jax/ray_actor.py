"""The actor of ``on_ray``: what runs on a cluster's machines. It chooses devices before it imports JAX."""

import importlib
import importlib.metadata
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from arrag_jax import __version__, files
from arrag_jax.errors import UserError


def versions() -> dict[str, str]:
    """Returns the versions that must be equal on all machines, by package."""
    return {"arrag_jax": __version__, "jax": importlib.metadata.version("jax")}


class Hand:
    """The actor: works on items in a process of a cluster's machine, for one worker after the other."""

    _worker: Any = None
    _key = ""

    def open(
        self, wanted: Mapping[str, str], platforms: str, folder: str, sent: Sequence[Any], key: str = ""
    ) -> tuple[str, str, str]:
        """Opens the worker in the driver's folder, because paths may be relative.

        Args:
          wanted: the driver's ``versions``.
          platforms: JAX_PLATFORMS, unless the machine sets it.
          folder: the driver's folder.
          sent: a list of one reference, to the function that makes the worker.
          key: names everything that the worker depends on; a worker of this key that is open stays so. "" = none.

        Returns:
          The machine's name, Ray's id of it, and what is wrong ("" = nothing).
        """
        ray: Any = importlib.import_module("ray")
        os.environ.setdefault("JAX_PLATFORMS", platforms)  # before jax is imported
        host, node = socket.gethostname(), ray.get_runtime_context().get_node_id()
        if key and key == self._key:
            return host, node, ""
        other = [f"{name} {here}, not {wanted[name]}" for name, here in versions().items() if here != wanted[name]]
        if other:
            return host, node, f"it has {', '.join(other)}; install the same on all machines"
        try:
            os.chdir(folder)
        except OSError as error:
            return host, node, f"it cannot enter {folder}, where the command runs ({error.strerror}); share that folder"
        files.name_writer(f"{host}-{os.getpid()}")
        importlib.import_module("arrag_jax.command").enable_compilation_cache()
        self._worker = None  # frees the memory of an earlier one
        try:
            self._worker = ray.get(sent[0])()
        except UserError as error:
            return host, node, str(error)
        self._key = key
        return host, node, ""

    def do(self, item: Any) -> tuple[Any, list[str]]:
        """Returns the result of an item, and the lines that its worker told."""
        told = _Told()
        return self._worker(item, told), told.lines


class _Told:
    """A ``work.Report`` that keeps the lines for the driver, which also counts finished items."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def count(self, units: int) -> None:
        pass

    def tell(self, line: str) -> None:
        self.lines.append(line)
