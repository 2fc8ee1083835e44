"""From a ``DrawConfig`` to pictures: what ``generate`` and ``eval`` have in common."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, UInt8
from tqdm import tqdm

from arrag_jax.config import DrawConfig
from arrag_jax.decode.loop import Drawn, sample
from arrag_jax.decode.policies import Daid, Plain
from arrag_jax.errors import UserError
from arrag_jax.interfaces import DecodePolicy, Retriever
from arrag_jax.models.checkpoint import fingerprint, load_model
from arrag_jax.models.janus import Janus
from arrag_jax.models.text import PromptTokenizer
from arrag_jax.nn.vq import from_uint8, to_uint8
from arrag_jax.retrieval.datastore import Datastore
from arrag_jax.retrieval.load import load_retriever

METHODS = ("plain", "daid")


class CellBar:
    """A progress bar over cells, fed from inside the compiled loop; one object serves all batches."""

    def __init__(self):
        self.bar = None

    def __call__(self, cell: Any) -> None:
        """One more cell of the whole batch is drawn."""
        if self.bar is not None:
            self.bar.update()


@dataclasses.dataclass(frozen=True)
class Studio:
    """A model, its prompt tokenizer and, where a method needs it, a store with its search.

    Attributes:
      store, retriever: None if no method asked for retrieves.
    """

    config: DrawConfig
    model: Janus
    text: PromptTokenizer
    store: Datastore | None
    retriever: Retriever | None
    bar: CellBar = dataclasses.field(default_factory=CellBar)

    def policy(self, method: str) -> DecodePolicy:
        """The policy that a method's name stands for."""
        return Plain() if method == "plain" else Daid.checked(**dataclasses.asdict(self.config.daid))

    def draw(
        self, prompts: Sequence[str], method: str, seeds: Int[np.ndarray, " N"]
    ) -> tuple[UInt8[np.ndarray, "N h w 3"], Drawn]:
        """Pictures of prompts, drawn in batches of ``config.batch_size``, and how they came about.

        A picture depends on its prompt, method and seed alone. Shows a progress bar over the cells.
        """
        size, cells = min(self.config.batch_size, len(prompts)), int(np.prod(self.model.grid))
        ids, mask = self.text(prompts)
        images, drawn = [], []
        self.bar.bar = tqdm(total=-(-len(prompts) // size) * cells, desc=f"drawing {method}", unit="cell")
        for start in range(0, len(prompts), size):
            # The last batch is filled up with its own first row, so that one shape is compiled.
            rows = np.resize(np.arange(start, min(start + size, len(prompts))), size)
            result = sample(
                self.model, ids[rows], self.policy(method), self.retriever, seed=seeds[rows],
                prompt_mask=mask[rows], on_cell=self.bar, **dataclasses.asdict(self.config.sampling),
            )  # fmt: skip
            pixels = to_uint8(self.model.decode_codes(result.codes, *self.model.grid))
            keep = len(np.unique(rows))
            images.append(np.asarray(pixels)[:keep])
            drawn.append(jax.tree.map(lambda x, keep=keep: np.asarray(x)[:keep], result))
        jax.effects_barrier()
        self.bar.bar.close()
        return np.concatenate(images), jax.tree.map(lambda *x: np.concatenate(x), *drawn)


def open_studio(config: DrawConfig, methods: Sequence[str]) -> Studio:
    """Loads what the methods need, and checks that it belongs together.

    Raises:
      UserError: an unknown method, a checkpoint that can't be read, a store of another tokenizer, …
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise UserError(f"--method={unknown[0]!r} is unknown; this checkpoint can do: {', '.join(METHODS)}")
    Daid.checked(**dataclasses.asdict(config.daid))
    model = load_model(config.model)
    text = PromptTokenizer.load(config.model)
    store = retriever = None
    if methods != ["plain"]:
        store, retriever = load_retriever(config.retrieval, fingerprint(model))
    return Studio(config, model, text, store, retriever)


def reconstruct(model: Janus, images: UInt8[np.ndarray, "N h w 3"]) -> UInt8[np.ndarray, "N h w 3"]:
    """Images through the tokenizer and back, a hundred at a time: the best that codes can look."""
    parts = []
    for start in range(0, len(images), 100):
        codes, latents = model.encode_images(from_uint8(images[start : start + 100]))
        parts.append(np.asarray(to_uint8(model.decode_codes(codes, *latents.shape[1:3]))))
    return np.concatenate(parts)
