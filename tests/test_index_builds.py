"""A saved index has the same bytes in every build of the same store, and a hash that tells two apart."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from arrag_jax.config import ScannOptions
from arrag_jax.retrieval import index
from arrag_jax.retrieval.patches import one_key_each
from arrag_jax.retrieval.scann import ScannRetriever, build_searcher
from helpers import stored

TREE = ScannOptions(exhaustive_below=0, leaves=30, leaves_to_search=3)
OTHER_TREE = ScannOptions(exhaustive_below=0, leaves=20, leaves_to_search=3)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def tree_of_many_keys(folder: Path) -> None:
    """Saves a tree over more keys than k-means sees, so that each build puts them into leaves anew."""
    keys = np.random.default_rng(0).normal(size=(230_000, 8)).astype(np.float32)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    patches = one_key_each(keys, np.zeros(len(keys), np.int32))((0, len(keys)))
    folder.mkdir()
    build_searcher(patches, ScannOptions(exhaustive_below=0, leaves=40, bytes_a_number=1)).serialize(
        str(folder), relative_path=True
    )


@pytest.mark.slow
def test_two_builds_have_the_same_bytes(tmp_path):
    store = stored.build(tmp_path / "store", captions=[str(i) for i in range(60)])
    for kind in ("codebook", "latent"):
        first = files(index.build_index(store, kind, TREE, shards=2))
        hashed = index.index_hash(store, kind)
        assert files(index.build_index(store, kind, TREE, shards=2)) == first
        assert index.index_hash(store, kind) == hashed
        index.build_index(store, kind, OTHER_TREE, shards=2)
        assert index.index_hash(store, kind) != hashed


@pytest.mark.slow
def test_another_process_builds_the_same_bytes(tmp_path):
    tree_of_many_keys(tmp_path / "one")
    subprocess.run([sys.executable, __file__, tmp_path / "two"], check=True, timeout=300)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_search_tells_the_hash_of_its_index(tmp_path):
    store = stored.build(tmp_path / "store")
    index.build_index(store, "codebook", TREE)
    host = index.load_index(store, "codebook", 4, TREE)
    assert host.index_hash == index.index_hash(store, "codebook") == host.with_k(5).index_hash
    assert ScannRetriever.of(host).host.index_hash == host.index_hash
    keys = stored.keys_of(store, "codebook")
    codebook = store.codebook
    assert ScannRetriever.create(keys, stored.values_of(store), codebook, 4).host.index_hash == ""


if __name__ == "__main__":
    tree_of_many_keys(Path(sys.argv[1]))
