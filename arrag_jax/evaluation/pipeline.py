"""Loads models and store from a ``DrawConfig`` and generates images; shared by ``generate`` and ``eval``."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Int, UInt8

from arrag_jax import progress
from arrag_jax.config import DrawConfig
from arrag_jax.decode.checks import require_blenders, require_states
from arrag_jax.decode.loop import SampleOutput
from arrag_jax.decode.methods import METHODS, Kind, Search, chosen_methods
from arrag_jax.decode.policies import with_gate
from arrag_jax.decode.stream import joined, sample_stream
from arrag_jax.errors import UserError
from arrag_jax.evaluation.open_search import OpenSearch, open_search
from arrag_jax.evaluation.trust import Trust
from arrag_jax.interfaces import AnyRetriever, Backbone, DecodePolicy, ImageModel, PromptEncoder, StateRetriever
from arrag_jax.mesh import make_mesh
from arrag_jax.models.checkpoint import config_of, load_model, load_prompts, sample_hashes
from arrag_jax.models.lookup import LookupModel
from arrag_jax.models.vq_images import with_whole_tokenizer
from arrag_jax.nn.vq import to_uint8
from arrag_jax.ops.keys import HIDDEN
from arrag_jax.processes import require_same
from arrag_jax.retrieval.around import LimitedAround
from arrag_jax.retrieval.captions import LimitedRetriever
from arrag_jax.retrieval.load import as_asked, index_hash_of, open_store
from arrag_jax.retrieval.stored_codes import StoredCodes
from arrag_jax.store.datastore import Datastore


class Batch(NamedTuple):
    """Images that were generated together.

    Attributes:
      numbers: numbers of their prompts.
      images: their pixels.
      drawn: their sampled codes and provenance, one row per image.
    """

    numbers: Int[np.ndarray, " n"]
    images: UInt8[np.ndarray, "n h w 3"]
    drawn: SampleOutput


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A model, its tuned variants, their prompt encoder and, if a method needs it, a store with its search.

    Attributes:
      methods: the requested methods, in the order of ``METHODS``.
      model: the base model, whose tokenizer all methods use.
      tuned: the models of the other methods, by method.
      searches: what the methods search; empty if no requested method retrieves.
      mesh: None = one device.
      folders: folders of the methods' models, by method.
      beside: the store whose images guard methods that search none, and help their windows; None = there is none.
    """

    config: DrawConfig
    methods: tuple[str, ...]
    model: ImageModel
    tuned: dict[str, Backbone]
    text: PromptEncoder
    searches: Mapping[Search, OpenSearch]
    mesh: Mesh | None = None
    folders: Mapping[str, str] = dataclasses.field(default_factory=dict)
    beside: OpenSearch | None = None

    @property
    def store(self) -> Datastore | None:
        """``datastore``; None if no requested method retrieves."""
        return self.datastore if self.searches else None

    @property
    def datastore(self) -> Datastore:
        """The store of ``config.retrieval``; if no method searches it, that of another search."""
        return (self.searches.get(Search.STORE) or next(iter(self.searches.values()))).store

    @property
    def retriever(self) -> AnyRetriever | None:
        """The search of ``config.retrieval``; None if no requested method searches the whole store."""
        return self.searches[Search.STORE].retriever if Search.STORE in self.searches else None

    def with_k(self, k: int) -> "Pipeline":
        """Returns a pipeline whose methods use k neighbours per position; errors as in ``OpenSearch.with_k``."""
        retrieval = dataclasses.replace(self.config.retrieval, k=k)
        hidden = dataclasses.replace(self.config.hidden, k=k)
        config = dataclasses.replace(self.config, retrieval=retrieval, hidden=hidden)
        searches = {name: opened.with_k(k) for name, opened in self.searches.items()}
        return dataclasses.replace(self, config=config, searches=searches)

    def search_of(self, method: str) -> OpenSearch:
        """Returns what a method that retrieves searches."""
        return self.searches[METHODS[method].search]

    def policy(self, method: str, prompts: Sequence[str] = ()) -> DecodePolicy:
        """Returns the policy of a method.

        Args:
          prompts: the prompts that are drawn, for the method's gate; () = the policy without its gate.
        """
        chosen = METHODS[method]
        policy, gate = chosen.policy(self.config), chosen.gate(self.config) if chosen.gate else None
        if not prompts or gate is None or not gate.features:
            return policy
        return with_gate(policy, self.search_of(method).trust.gate(gate, prompts))

    def stored_of(self, method: str) -> StoredCodes | None:
        """Returns the stored images that guard a method's draws and help its windows; None if they are not needed."""
        guarded = self.config.sampling.max_copied_cells is not None
        opened = self.searches.get(METHODS[method].search) or self.beside
        helped = self.config.sampling.window > 1 and self.mesh is None  # on a mesh, guesses cost a call to one device
        if opened is None or not (guarded or helped):
            return None
        if (grid := opened.store.settings.grid) == self.model.grid:
            return opened.stored
        if guarded:
            raise UserError(
                f"max_copied_cells needs stored images of the model's grid {self.model.grid}; those in "
                f"{opened.config.store} have {grid}"
            )
        return None

    def model_of(self, method: str) -> Backbone:
        """Returns the model that a method uses."""
        return self.tuned.get(method, self.model)

    def index_hash(self, method: str = "") -> str:
        """Returns the hash of the saved index that a method (or any method) searches; empty if it searches none."""
        if not method:
            return next(filter(None, (index_hash_of(x.retriever) for x in self.searches.values())), "")
        searches = METHODS[method].search is not Search.NONE and not METHODS[method].limited
        return index_hash_of(self.search_of(method).retriever) if searches else ""

    def retriever_for(self, method: str, prompts: Sequence[str]) -> AnyRetriever | None:
        """Returns the retriever that a method uses for these prompts."""
        if METHODS[method].search is Search.NONE:
            return None
        opened = self.search_of(method)
        if not METHODS[method].limited:
            return opened.retriever
        config, images = opened.config, self.images_for(method, prompts)
        k = min(config.k, images.shape[1] * (opened.store.num_rows(config.keys) // opened.store.num_images))
        kind = LimitedAround if config.two_sided else LimitedRetriever
        limited = kind.create(opened.store, images, config.keys, k)
        return opened.uncopied(as_asked(limited, opened.store, config.keys))

    def images_for(self, method: str, prompts: Sequence[str]) -> Int[np.ndarray, "B M"]:
        """Returns the stored images that a limited method searches for each prompt."""
        count, opened = METHODS[method].images, self.search_of(method)
        assert count is not None
        return opened.trust.captions.nearest(prompts, min(count(self.config), opened.store.num_shown))

    def _patches(self, method: str, source: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """Returns stored rows as numbers of patches with a context, which provenance works with; -1 for other rows."""
        if METHODS[method].search is Search.NONE or self.search_of(method).config.keys != HIDDEN.name:
            return source
        return HIDDEN.patches(source, self.model.grid)

    def _batch_size(self, count: int) -> int:
        ways = 1 if self.mesh is None else self.mesh.shape["data"]
        return -(-min(self.config.batch_size, count) // ways) * ways

    def batches(self, count: int) -> list[Int[np.ndarray, " n"]]:
        """Returns the numbers of the images that ``draw`` draws together, of ``count`` images."""
        size = self._batch_size(count)
        return [np.arange(start, min(start + size, count)) for start in range(0, count, size)]

    def pixels(self, codes: Int[np.ndarray, "n T"]) -> UInt8[np.ndarray, "n h w 3"]:
        """Returns images. Each is decoded alone: XLA rounds otherwise in other batch sizes, by one grey level."""
        decoded = [to_uint8(self.model.decode_codes(grid[None], *self.model.grid)) for grid in codes]
        return np.concatenate([np.asarray(image) for image in decoded])

    def draw(
        self,
        prompts: Sequence[str],
        method: str,
        seeds: Int[np.ndarray, " N"],
        wanted: Bool[np.ndarray, " N"] | None = None,
    ) -> Iterator[Batch]:
        """Yields generated images with their provenance, in batches of ``config.batch_size`` prompts.

        An image depends only on its prompt, method and seed. A progress bar over the positions advances row by row.

        Args:
          wanted: batches without a wanted image are skipped; None = all are wanted.
        """
        for numbers, length, count in self.each_batch(prompts, method, wanted):
            yield self.draw_batch(prompts, method, seeds, numbers, length, count)

    def each_batch(
        self, prompts: Sequence[str], method: str, wanted: Bool[np.ndarray, " N"] | None, passes: int = 1
    ) -> Iterator[tuple[Int[np.ndarray, " n"], int, Callable[[int], Any]]]:
        """Yields ``numbers``, ``length`` and ``count`` of ``draw_batch`` for each batch with a wanted image.

        Args:
          passes: how often each batch draws a whole grid, for the progress bar.
        """
        batches = [numbers for numbers in self.batches(len(prompts)) if wanted is None or wanted[numbers].any()]
        length = self.text.length(prompts)  # of all batches, so that one shape is compiled
        leads, total = jax.process_index() == 0, len(batches) * passes * self.positions
        with progress.bar(wanted=leads, total=total, desc=f"drawing {method}", unit="cell") as bar:
            for numbers in batches:
                yield numbers, length, bar.update

    @property
    def positions(self) -> int:
        """T, by which every batch advances the progress bar."""
        return int(np.prod(self.model.grid))

    def draw_batch(
        self,
        prompts: Sequence[str],
        method: str,
        seeds: Int[np.ndarray, " N"],
        numbers: Int[np.ndarray, " n"],
        length: int,
        count: Callable[[int], Any],
        known: Int[np.ndarray, "N T"] | None = None,
    ) -> Batch:
        """Returns the images of some of N prompts, drawn together.

        Args:
          numbers: of the prompts, one of ``batches(N)``.
          length: of all prompts (``PromptEncoder.length``).
          count: called with the number of positions that have been drawn since the last call.
          known: codes of the images that are taken in place of draws, -1 where a code is drawn; None = all are drawn.
        """
        # The last batch is padded with its own rows, so that only one shape is compiled.
        rows, keep, parts = np.resize(numbers, self._batch_size(len(prompts))), len(numbers), []
        given = None if known is None else known[rows]
        for row in self.rows([prompts[int(i)] for i in rows], method, seeds[rows], length, given):
            parts.append(jax.tree.map(lambda x: x[:keep], row))
            count(row.codes.shape[1])
        drawn = joined(parts)
        return Batch(numbers, self.pixels(np.asarray(drawn.codes)), drawn)

    def rows(
        self,
        prompts: Sequence[str],
        method: str,
        seeds: Int[np.ndarray, " n"],
        length: int | None = None,
        known: Int[np.ndarray, "n T"] | None = None,
    ) -> Iterator[SampleOutput]:
        """Yields the rows of one batch of code grids as they are drawn; see ``decode.stream.sample_stream``.

        Args:
          length: as in ``interfaces.PromptEncoder``.
          known: as in ``decode.loop.sample``.
        """
        stream = sample_stream(
            self.model_of(method), self.text(prompts, length), self.policy(method, prompts),
            self.retriever_for(method, prompts), seed=seeds, mesh=self.mesh, stored=self.stored_of(method),
            known=known, **dataclasses.asdict(self.config.sampling),
        )  # fmt: skip
        for row in stream:
            yield row._replace(source=self._patches(method, np.asarray(row.source)))


def open_pipeline(config: DrawConfig, methods: Sequence[str] = (), alone: bool = False) -> Pipeline:
    """Loads what the methods need, and checks that it belongs together.

    Args:
      config: what to load, and the mesh to use.
      methods: names from ``METHODS``; none = the config's methods. If the config names none either, all default methods
        that its models can do.
      alone: the mesh spans this process's devices alone, because each process of the run draws images of its own.

    Raises:
      UserError: if the models cannot do a method, a checkpoint cannot be read, a store belongs to another tokenizer, …
    """
    devices = make_mesh(config.mesh, alone)
    mesh = devices if devices.size > 1 else None
    blended = config.faid_model or (config.model if config_of(config.model).blended_neighbors else "")
    folders = {
        Kind.BASE: config.model,
        Kind.LORA: config.lora_model,
        Kind.FAID: blended,
        Kind.FAID_HIDDEN: config.hidden.faid_model,
    }
    chosen = chosen_methods(tuple(methods or config.methods), {kind for kind, folder in folders.items() if folder})
    where = {name: folders[METHODS[name].model] for name in chosen}
    used = {config.model, *where.values()}
    if jax.process_count() > 1:
        require_same({name: value for folder in used for name, value in sample_hashes(folder).items()}, "model")
    model = _loaded(config.model, config, mesh)
    _ = model.codebook  # raises now, not after drawing, if the folder holds no image tokenizer
    tuned = _tuned(config, where, model, mesh)
    limited = [name for name in chosen if METHODS[name].limited]
    if limited and mesh is not None:
        raise UserError(
            f"methods that search by caption ({', '.join(limited)}) run on one device; "
            "give --config.mesh.data=1 --config.mesh.fsdp=1"
        )
    users = {search: [METHODS[name] for name in chosen if METHODS[name].search is search] for search in Search}
    searches: dict[Search, OpenSearch] = {
        search: open_search(config, search, methods, model, mesh)
        for search, methods in users.items()
        if search is not Search.NONE and methods
    }
    for name in chosen:
        policy, opened = METHODS[name].policy(config), searches.get(METHODS[name].search)
        if opened is not None and isinstance(opened.retriever, StateRetriever):
            require_states(model)
        if opened is not None and policy.blends:
            require_blenders(tuned[name], cast(Any, opened.retriever))
    beside = searches.get(Search.STORE) or next(iter(searches.values()), None)
    if beside is None and config.sampling.max_copied_cells is not None:
        store = open_store(config.retrieval, model.fingerprint)[0]
        beside = OpenSearch(config.retrieval, store, None, Trust(store))
    return Pipeline(config, chosen, model, tuned, load_prompts(config.model), searches, mesh, where, beside)


def _tuned(config: DrawConfig, where: Mapping[str, str], model: ImageModel, mesh: Mesh | None) -> dict[str, Backbone]:
    """Returns the models of the methods that do not use the base alone; ``where`` names their folders."""
    loaded: dict[str, ImageModel] = {config.model: model}
    for folder in {*where.values()} - {config.model}:
        loaded[folder] = _loaded(folder, config, mesh)
        if loaded[folder].fingerprint != model.fingerprint:
            raise UserError(f"{folder} has another image tokenizer than {config.model}; tune it from that model")
    kinds = {name: METHODS[name].model for name in where}
    pairs = {where[name]: LookupModel(loaded[where[name]], model) for name in where if kinds[name] is Kind.FAID_HIDDEN}
    return {
        name: (pairs if kinds[name] is Kind.FAID_HIDDEN else loaded)[folder]
        for name, folder in where.items()
        if kinds[name] is not Kind.BASE
    }


def _loaded(folder: str, config: DrawConfig, mesh: Mesh | None) -> ImageModel:
    """Returns the model of a folder, its large parameters split over the mesh; its image tokenizer is not split."""
    if mesh is None or mesh.shape["fsdp"] == 1:  # then every device needs the whole model, and only while it draws
        return load_model(folder, config.dtype, int8=config.int8)
    return with_whole_tokenizer(load_model(folder, config.dtype, mesh=mesh, int8=config.int8), mesh)
