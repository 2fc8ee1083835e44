"""Opens the store and the search that a config names."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from arrag_jax import on_ray
from arrag_jax.config import RetrievalConfig
from arrag_jax.errors import UserError
from arrag_jax.files import is_held
from arrag_jax.forks import require_own_process
from arrag_jax.interfaces import AnyRetriever
from arrag_jax.ops.keys import KEY_KINDS
from arrag_jax.processes import require_same
from arrag_jax.ray_shares import Shares
from arrag_jax.retrieval.around import DenseAround
from arrag_jax.retrieval.dense import DenseRetriever
from arrag_jax.retrieval.index import RECORD, index_hash, load_index, saved_shards
from arrag_jax.retrieval.patches import Patches, stored_patches
from arrag_jax.retrieval.remote import DenseShare, RemoteSearch, ScannShare, ShareWorker
from arrag_jax.retrieval.scann import HostSearch, ScannRetriever, build_host, shard_bounds
from arrag_jax.retrieval.sharded import local_shards, shard_dense, shard_scann
from arrag_jax.retrieval.states import HiddenRetriever
from arrag_jax.store.datastore import Datastore
from arrag_jax.store.rights import require_licences
from arrag_jax.store.shards import MANIFEST, content_hash

T = TypeVar("T")
PATIENCE = 5.0  # time limit in seconds for a writer to put its new files in place
TRIES = 5


def settled(directory: str | Path, read: Callable[[], T]) -> T:
    """Returns the result of ``read``, which reads a store and its indexes, from one consistent state of the files.

    When a store grows, its manifest and its indexes are replaced in several steps. If they change during ``read``, or
    ``read`` fails while another process writes, it is called again.

    Raises:
      UserError: as in ``read``, if the store does not change.
    """
    directory = Path(directory)
    found: Any = None
    for tries in range(TRIES, 0, -1):
        before, found, failure = _state(directory), None, None
        try:
            found = read()
        except UserError as error:
            failure = error
            give_up = time.monotonic() + PATIENCE
            while is_held(directory) and _state(directory) == before and time.monotonic() < give_up:
                time.sleep(0.02)
        if _state(directory) == before or tries == 1:
            break
    if failure is not None:
        raise failure
    return found


def _state(directory: Path) -> dict[str, bytes]:
    """Returns the bytes of the manifest and of the indexes' records."""
    state = {}
    for path in (directory / MANIFEST, *sorted(directory.glob(f"index-*/{RECORD}"))):
        with contextlib.suppress(OSError):
            state[path.parent.name] = path.read_bytes()
    return state


def backbone_of(model: Any, keys: str) -> str:
    """Returns the fingerprint of the backbone whose states are searched; "" if the kind of key has no states."""
    return getattr(model, "backbone_fingerprint", "") if KEY_KINDS[keys].query_from == "state" else ""


def as_asked(search: Any, store: Datastore, keys: str) -> Any:
    """Returns a search over keys of a kind in the form in which the decode loop calls it."""
    return HiddenRetriever(search, jnp.asarray(store.table(keys))) if KEY_KINDS[keys].query_from == "state" else search


def resolved(config: RetrievalConfig, mesh: Mesh | None = None) -> RetrievalConfig:
    """Returns the settings with the search that "auto" stands for on the mesh's devices (None = the default ones)."""
    if config.two_sided:
        return dataclasses.replace(config, search="dense", storage="codes")
    if config.search != "auto":
        return config
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    if platform == "cpu":
        return dataclasses.replace(config, search="scann")
    storage = "codes" if config.keys == "codebook" and config.storage == "float32" else config.storage
    return dataclasses.replace(config, search="dense", storage=storage)


def open_store(config: RetrievalConfig, fingerprint: str, backbone: str = "") -> tuple[Datastore, bool]:
    """Opens the images of a datastore that a config requests; also returns whether these are all its images.

    Args:
      fingerprint: identity of the model's tokenizer.
      backbone: fingerprint of the backbone, for hidden keys.

    Raises:
      UserError: if there is no such store, another tokenizer made it, its manifest is damaged, or the processes of a
        run see different stores.
    """
    store = Datastore.open(config.store)
    require_same({f"{config.store}/manifest.json": store.store_fingerprint}, "store")
    store.require_tokenizer(fingerprint)
    store.require_manifest()
    store = dataclasses.replace(store, backbone=backbone, licences=tuple(x.lower() for x in config.licences))
    if store.licences:
        require_licences(store.directory, store.licences, store.rights)
    whole = config.num_images in (0, store.num_images)
    return store if whole else store.subset(config.num_images), whole


def index_hash_of(retriever: AnyRetriever | None) -> str:
    """Returns the hash of the saved index that a retriever uses (``index.index_hash``); "" if it uses none."""
    requested: Any = retriever
    while hasattr(requested, "local"):
        requested = requested.local
    return requested.host.index_hash if isinstance(requested, ScannRetriever) else ""


def load_retriever(
    config: RetrievalConfig,
    fingerprint: str,
    mesh: Mesh | None = None,
    axis: str = "data",
    batch_axis: str | None = None,
    backbone: str = "",
) -> tuple[Datastore, Any]:
    """Returns a datastore and its retriever.

    Args:
      config: names the store, the keys and the search.
      fingerprint: identity of the model's tokenizer, which must have made the store.
      mesh: shard the store over ``axis`` of this mesh; None = keep it on one device (or one host).
      axis: the mesh axis over which the store is sharded.
      batch_axis: the mesh axis over which queries are sharded; see ``ShardedRetriever``.
      backbone: fingerprint of the backbone whose states are searched (``backbone_of``); "" = keys of the context.

    Returns:
      The store, and an ``interfaces.Retriever``, a ``StateRetriever`` for hidden keys, or an ``AroundRetriever``.

    Raises:
      UserError: if there is no such store or index, another tokenizer made it, or k exceeds the stored patches.
    """
    require_own_process()
    config = resolved(config, mesh)
    return settled(config.store, lambda: _load(config, fingerprint, mesh, axis, batch_axis, backbone))


def _load(
    config: RetrievalConfig, fingerprint: str, mesh: Mesh | None, axis: str, batch_axis: str | None, backbone: str
) -> tuple[Datastore, Any]:
    store, whole = open_store(config, fingerprint, backbone)
    store.require_kind(config.keys)
    if config.two_sided:
        if mesh is not None:
            raise UserError("two_sided=True runs on one device; give --config.mesh.data=1 --config.mesh.fsdp=1")
        return store, DenseAround.of_store(store, config.k)
    rows, table = store.num_rows(config.keys), store.table(config.keys)

    def patches(rows: tuple[int, int]) -> Patches:
        return stored_patches(store, config.keys, rows)

    if config.search.startswith("ray"):
        if mesh is not None:
            mend = "give --config.mesh.data=1 --config.mesh.fsdp=1"
            raise UserError(f"retrieval.search={config.search!r} runs on one device; {mend}")
        search: Any = ScannRetriever.of(cast(Any, spread(config, store, whole, fingerprint, backbone)))
    elif config.search == "dense" and mesh is None:
        search = DenseRetriever.of(patches((0, rows)), table, config.k, config.storage)
    elif config.search == "dense" and mesh is not None:
        search = shard_dense(patches, rows, table, config.k, mesh, axis, batch_axis, config.storage)
    else:
        shards, local = (1, [0]) if mesh is None else (mesh.shape[axis], local_shards(mesh, axis))
        host = _host(config, store, whole, shards, local)
        search = ScannRetriever.of(host) if mesh is None else shard_scann(host, mesh, axis, batch_axis)
    return store, as_asked(search, store, config.keys)


def _host(config: RetrievalConfig, store: Datastore, whole: bool, shards: int, local: Sequence[int]) -> HostSearch:
    """Returns the ScaNN search of some shards."""
    if whole:
        return load_index(store, config.keys, config.k, config.scann, shards, local)
    rows, table = store.num_rows(config.keys), store.table(config.keys)  # a saved index covers all images, not a subset
    patches = functools.partial(stored_patches, store, config.keys)
    return build_host(patches, rows, table, config.k, config.scann, shards, local)


def spread(config: RetrievalConfig, store: Datastore, whole: bool, fingerprint: str, backbone: str) -> RemoteSearch:
    """Returns the search of a store whose shares are held by the machines of a Ray cluster.

    Raises:
      UserError: if the cluster cannot be joined, a share cannot be opened, or the index has fewer shards than shares.
    """
    rows, dense = store.num_rows(config.keys), config.search == "ray_dense"
    wanted = config.ray.shares or on_ray.machines(config.ray.cluster)
    shards = wanted if dense or not whole else saved_shards(store, config.keys)
    if config.ray.shares > shards:
        raise UserError(
            f"the index over {config.keys} keys in {store.directory} has {shards} shards, too few for "
            f"retrieval.ray.shares={wanted}; build it with more: --config.index_shards={wanted}"
        )
    hash_ = "" if dense or not whole else index_hash(store, config.keys)
    identity = content_hash({"store": store.store_fingerprint, "index": hash_, **dataclasses.asdict(config)})[:16]
    makers = {
        f"{config.keys} {identity} {first}-{end} of {shards}": functools.partial(
            _share, config, fingerprint, backbone, store.store_fingerprint, shards, (first, end)
        )
        for first, end in shard_bounds(shards, min(wanted, shards))
    }
    return RemoteSearch(Shares(config.ray.cluster, makers, str(store.directory)), rows, config.k, hash_)


def _share(
    config: RetrievalConfig, fingerprint: str, backbone: str, expected: str, shards: int, own: tuple[int, int]
) -> ShareWorker:
    """Opens some neighbouring shards in a process of another machine."""

    def opened() -> ShareWorker:
        store, whole = open_store(config, fingerprint, backbone)
        if store.store_fingerprint != expected:
            raise UserError(f"{config.store} is another store here, or has grown; give the same to all machines")
        if config.search == "ray":
            return ShareWorker(ScannShare(_host(config, store, whole, shards, range(*own))))
        bounds = shard_bounds(store.num_rows(config.keys), shards)
        rows = bounds[own[0]][0], bounds[own[1] - 1][1]
        patches, k = stored_patches(store, config.keys, rows), min(config.k, rows[1] - rows[0])
        dense = DenseRetriever.of(patches, store.table(config.keys), k, config.storage)
        return ShareWorker(DenseShare(dense, rows[0]))

    return settled(config.store, opened)
