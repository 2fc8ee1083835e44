"""A compiled drawing depends on shapes and kinds alone: it serves every retriever alike, and keeps none of them."""

import dataclasses
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from arrag_jax.decode import loop
from arrag_jax.decode.policies import Daid
from arrag_jax.decode.stream import joined, sample_stream
from arrag_jax.ops import handles
from arrag_jax.retrieval import sharded
from arrag_jax.retrieval.patches import stored_patches
from arrag_jax.retrieval.scann import ScannRetriever, build_host
from arrag_jax.retrieval.scann_rules import EXHAUSTIVE
from helpers import stored, tiny


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return stored.build(tmp_path_factory.mktemp("store") / "store")


@pytest.fixture(scope="module")
def model():
    return tiny.janus()


def opened(store, k: int = 4, mesh=None):
    """A search over an index of its own, and weak references to what must go with it."""
    shards = 1 if mesh is None else mesh.shape["store"]
    host = build_host(
        lambda rows: stored_patches(store, "codebook", rows), store.num_patches, store.codebook, k, EXHAUSTIVE, shards
    )
    retriever = ScannRetriever.of(host) if mesh is None else sharded.shard_scann(host, mesh, "store")
    return retriever, [weakref.ref(x) for x in (retriever, host, *host.shards.values())]


def draw(model, retriever, stream=False):
    prompts, mask = tiny.prompts((4, 6))
    daid = Daid(weight=0.9, temperature=0.1)
    how = sample_stream if stream else loop.sample
    return how(model, prompts, daid, retriever, cfg_scale=None, prompt_mask=mask)


def assert_gone(references) -> None:
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


@pytest.mark.slow
def test_twenty_retrievers_draw_by_one_program_and_go(store, model):
    loop._advance.clear_cache()
    references, codes = [], []
    for _ in range(20):
        retriever, own = opened(store)
        codes.append(np.asarray(draw(model, retriever).codes))
        references += own
        del retriever
    assert loop._advance._cache_size() == 1
    assert_gone(references)
    for drawn in codes:
        np.testing.assert_array_equal(drawn, codes[0])


@pytest.mark.slow
def test_sharded_retrievers_draw_by_one_program_and_go(store, model):
    mesh = jax.make_mesh((2,), ("store",), (AxisType.Auto,), devices=jax.devices()[:2])
    loop._advance.clear_cache()
    references = []
    for _ in range(3):
        retriever, own = opened(store, mesh=mesh)
        jax.block_until_ready(draw(model, retriever))
        references += own
        del retriever
    assert loop._advance._cache_size() == 1
    assert_gone(references)


@pytest.mark.slow
def test_another_k_is_another_program_of_the_same_index(store):
    search = jax.jit(lambda retriever, context: retriever.search(context))
    context, references = np.zeros((3, 4), np.int32), []
    for _ in range(3):
        retriever, own = opened(store)
        few, many = search(retriever, context), search(retriever.with_k(9), context)
        assert few.id.shape == (3, 4) and many.id.shape == (3, 9)
        np.testing.assert_array_equal(few.id, many.id[:, :4])
        references += own
        jax.block_until_ready(many)
        del retriever
    assert search._cache_size() == 2
    assert_gone(references)


def test_each_retriever_answers_for_itself(store):
    """Programs are shared; answers are not, nor what ``tree.map`` or a program makes of a retriever."""
    whole, _ = opened(store)
    part, _ = opened(store.subset(3))
    context = np.asarray([[0, 1, 2, 3], [4, 5, 6, 7]], np.int32)
    search = jax.jit(lambda retriever, context: retriever.search(context))
    passed = jax.jit(lambda retriever: retriever)
    for retriever in (whole, part, whole):
        true = retriever.host.search(context, np.int32(0))
        for copy in (
            retriever,
            jax.tree.map(lambda x: x, retriever),
            passed(retriever),
            dataclasses.replace(retriever),
        ):
            assert copy.handle is retriever.handle
            for ours, theirs in zip(search(copy, context), true, strict=True):
                np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_results_that_are_pending_keep_what_they_need(store):
    """The retriever is dropped as soon as the call returns, again and again."""
    slow = jax.jit(
        lambda retriever, context: jax.lax.fori_loop(
            0, 300, lambda _, x: x + 1 + jnp.minimum(retriever.search(context + x % 2).id[0, 0], 0), jnp.int32(0)
        )
    )
    context = np.zeros((1, 4), np.int32)
    for _ in range(5):
        retriever, references = opened(store)
        result = slow(retriever, context)
        del retriever
        gc.collect()
        assert int(result) == 300
        assert_gone(references)


@pytest.mark.slow
def test_a_stream_that_is_stopped_holds_nothing_and_shares_the_program(store, model):
    loop._advance.clear_cache()
    retriever, _ = opened(store)
    whole = draw(model, retriever)
    references = []
    for _ in range(3):
        retriever, own = opened(store)
        references += own
        stream = draw(model, retriever, stream=True)
        rows = [next(stream), next(stream)]
        del stream, retriever
        np.testing.assert_array_equal(joined(rows).codes, whole.codes[:, :10])
    assert_gone(references)
    assert loop._advance._cache_size() == 1


@pytest.mark.slow
def test_an_object_stays_until_pending_results_are_there(monkeypatch):
    """On an accelerator a call returns before its program ends."""

    class Result:
        ready = False

        def is_ready(self):
            return self.ready

        def is_deleted(self):
            return False

    result = Result()
    monkeypatch.setattr(handles.jax, "live_arrays", lambda: [result])
    handle = handles.Handle(object())
    number, target = handle.number, handle.target
    del handle
    gc.collect()
    assert handles.look_up(number) is target
    result.ready = True
    gc.collect()
    assert handles.look_up(number) is None


@pytest.mark.slow
def test_a_retriever_that_is_gone_is_named(store):
    retriever, references = opened(store)
    number = retriever.number
    del retriever
    assert_gone(references)
    assert handles.look_up(number) is None
    gone = ScannRetriever(np.int32(0), number, 4, None)
    with pytest.raises(Exception, match="ScannRetriever that was freed"):
        jax.block_until_ready(jax.jit(lambda retriever, x: retriever.search(x))(gone, np.zeros((1, 4), np.int32)))
