"""Addresses that the web commands listen on, and the packages that they need."""

import importlib
import socket

from arrag_jax.errors import UserError


def require_packages(*names: str) -> None:
    """Raises UserError unless the packages of the extra ``web`` are installed."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"this command needs {name}; install it: pip install 'arrag_jax[web]' ({error})") from None


def require_free(host: str, port: int) -> None:
    """Raises UserError unless this process can listen on the address."""
    if not 0 < port < 65536:
        raise UserError(f"--port={port} is outside [1, 65535]")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None
