"""Makes the gates of methods: what a store tells about its images and about prompts, as ``decode.gates`` reads it."""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from arrag_jax.config import CaptionConfig, GateConfig
from arrag_jax.decode.gates import FEATURES, OF_PROMPT, OF_STORE, Gate, Knowledge
from arrag_jax.errors import UserError
from arrag_jax.evaluation.sentences import SentenceIndex
from arrag_jax.ops.keys.hidden import Told
from arrag_jax.retrieval.captions import CaptionIndex, TermIndex
from arrag_jax.store.datastore import Datastore
from arrag_jax.store.hidden import joined

BY_WORDS = CaptionConfig()
POWER = 4  # images of a prompt are weighted by the cosine of their captions to this power


class Trust:
    """A store's captions, and how well the model knows its images; both are read on first use."""

    def __init__(self, store: Datastore, config: CaptionConfig = BY_WORDS):
        self._store, self._config = store, config

    @functools.cached_property
    def captions(self) -> CaptionIndex:
        """The captions of the store.

        Raises:
          UserError: if the store holds none, or the sentence model that compares them is missing.
        """
        if self._config.nearness == "sentences":
            return SentenceIndex(self._store.captions, self._config.sentence_model, self._store.shown)
        return TermIndex(self._store.captions, self._store.shown)

    @functools.cached_property
    def told(self) -> Told:
        """Surprise and excess of all codes of the store.

        Raises:
          UserError: if the store has no hidden keys of the model's backbone.
        """
        told = joined(folder.told() for folder in self._store.hidden)
        return Told(*(field[: self._store.num_images] for field in told))

    @functools.cached_property
    def _known(self) -> Knowledge:
        surprise, excess, mean_surprise, mean_excess = self.told
        return Knowledge(surprise.reshape(-1), excess.reshape(-1), mean_surprise, mean_excess, surprise.shape[1])

    def gate(self, config: GateConfig, prompts: Sequence[str]) -> Gate:
        """Returns a gate for these prompts.

        Raises:
          UserError: if a feature is unknown, or the store has no hidden keys or captions that it needs.
        """
        for name in config.features:
            if name not in FEATURES:
                raise UserError(f"gate.features: {name!r} is unknown; choose from {', '.join(FEATURES)}")
        needs_store = set(config.features) & set(OF_STORE)
        return Gate(
            np.asarray(config.slopes, np.float32),
            np.asarray(config.thresholds, np.float32),
            self._known if needs_store else None,
            {name: self.of_prompts(name, prompts, config.images) for name in config.features if name in OF_PROMPT},
            config.features,
            config.combine,
        )

    def of_prompts(self, name: str, prompts: Sequence[str], images: int) -> Float[np.ndarray, " B"]:
        """Returns a feature of prompts; 0 for a prompt that shares no word with any caption.

        Args:
          name: "caption", the cosine of the nearest caption; or "prompt_excess" or "prompt_surprise", the mean over
            the nearest images, weighted by the cosine of their captions to the power ``POWER``.
          images: number of nearest images.
        """
        known = {prompt: self._of_prompt(name, prompt, images) for prompt in set(prompts)}
        return np.array([known[prompt] for prompt in prompts], np.float32)

    def _of_prompt(self, name: str, prompt: str, images: int) -> float:
        cosine = self.captions.cosine(prompt)
        if name == "caption":
            return float(cosine.max())
        near = np.argsort(-cosine, kind="stable")[:images]
        weight = cosine[near] ** POWER
        values = self.told.mean_excess if name == "prompt_excess" else self.told.mean_surprise
        return float((weight * values[near]).sum() / weight.sum()) if weight.any() else 0.0
