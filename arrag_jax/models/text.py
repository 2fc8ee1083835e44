"""Tokenizes prompts in the chat form of Janus, with a ``tokenizer.json`` of the ``tokenizers`` library.

Source: docs/reference.md "Prompt". A prompt becomes the begin-of-sentence token and
``<|User|>: TEXT\\n\\n<|Assistant|>:<begin_of_image>``. Batches are padded on the left.
"""

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from arrag_jax.errors import UserError
from arrag_jax.json_files import require_no_pointer
from arrag_jax.models.config_json import read_config, require_language
from arrag_jax.models.manifest import require_written
from arrag_jax.models.place import checkpoint_folder
from arrag_jax.models.presets import PAD
from arrag_jax.models.schema import MOST_TOKENS
from arrag_jax.parsing import shown

BOS, UNKNOWN = "<｜begin▁of▁sentence｜>", "<unk>"
USER, ASSISTANT, IMAGE_START = "<|User|>", "<|Assistant|>", "<begin_of_image>"
SPECIAL = [BOS, PAD, UNKNOWN, USER, ASSISTANT, IMAGE_START]
COLON = ":"  # the only punctuation mark of the chat form


def chat_form(prompt: str) -> str:
    """Returns the text that Janus reads for a prompt; the model's next token is the first image code."""
    return f"{USER}: {prompt}\n\n{ASSISTANT}:{IMAGE_START}"


class PromptTokenizer:
    """Turns prompts into ids and a mask.

    Attributes:
      pad_id: id that fills the left of short prompts. ``load`` takes it from the model's config.
      vocab_size: upper bound of the ids, exclusive.
      max_length: longest prompt in tokens, including the chat form. If the model's config says how many positions the
        model was trained on, ``load`` sets it to that number less the positions of an image.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int = 512):
        self.tokenizer, self.max_length = tokenizer, max_length
        self.vocab_size = tokenizer.get_vocab_size()
        places: dict[str, Any] = {t: tokenizer.token_to_id(t) for t in (BOS, PAD, IMAGE_START)}
        missing = [t for t, place in places.items() if place is None]
        if missing:
            raise UserError(f"this tokenizer has no {missing[0]} token: it is not a Janus tokenizer")
        self.pad_id, self._bos = places[PAD], places[BOS]
        added = tokenizer.get_added_tokens_decoder().values()
        self._special = dict.fromkeys([*SPECIAL, *(token.content for token in added if token.special)])
        # The words that a word-level tokenizer knows; None for other tokenizers, which can read any text.
        by_words = isinstance(tokenizer.model, models.WordLevel)
        self._words = frozenset(tokenizer.get_vocab()) - {*self._special, COLON} if by_words else None

    @classmethod
    def load(cls, directory: str | Path) -> "PromptTokenizer":
        """Returns the tokenizer of a checkpoint folder, or of the export of a training run.

        Raises:
          UserError: if ``tokenizer.json`` is absent or damaged, or does not fit the model's config.
        """
        directory = checkpoint_folder(Path(directory))
        path = directory / "tokenizer.json"
        config = read_config(directory) if (directory / "config.json").is_file() else None
        if config is not None:
            require_language(config, directory)
        if not path.is_file():
            raise UserError(f"{path} is not there; copy the checkpoint's tokenizer.json beside its weights")
        require_written(path)
        with open(path, "rb") as file:
            require_no_pointer(file.read(64), str(path))
        try:
            text = cls(Tokenizer.from_file(str(path)))
            # Contradictions between parts of the file become visible only when a text is encoded.
            frame = text.tokenizer.encode(chat_form("")).ids
            largest = max(*text.tokenizer.get_vocab().values(), *frame)
            if largest > MOST_TOKENS or text.tokenizer.token_to_id(UNKNOWN) in frame:
                raise ValueError(f"it frames a prompt by the ids {frame}, of which one is too large or unknown")
        except (UserError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises plain Exceptions and, after a panic, a BaseException
            reason = shown(" ".join(str(error).split()))
            raise UserError(f"{path} cannot be read as a tokenizer ({reason}); copy it again") from error
        if config is not None:
            if config.decoder.vocab_size <= largest:
                raise UserError(
                    f"{path} gives ids up to {largest}, the model beside it has a vocabulary of "
                    f"{config.decoder.vocab_size}; copy the checkpoint again"
                )
            text.pad_id = config.pad_id
            if config.max_positions is not None:
                text.max_length = config.max_positions - math.prod(config.grid)
        return text

    @classmethod
    def of_words(cls, captions: Iterable[str]) -> "PromptTokenizer":
        """Returns a word-level tokenizer whose vocabulary is the words in ``captions`` and Janus' special tokens."""
        words = sorted({word for caption in captions for word in caption.split()})
        vocabulary = [*SPECIAL, COLON, *words]
        ids = {token: place for place, token in enumerate(vocabulary)}
        tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
        tokenizer.add_special_tokens(SPECIAL)
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
        return cls(tokenizer)

    @property
    def vocabulary(self) -> dict[str, int]:
        """The id of each token."""
        return self.tokenizer.get_vocab()

    def save(self, directory: str | Path) -> None:
        """Writes ``tokenizer.json``."""
        self.tokenizer.save(str(Path(directory) / "tokenizer.json"))

    def __call__(
        self, prompts: Sequence[str], length: int | None = None
    ) -> tuple[Int[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
        """Returns ids and mask of prompts, padded on the left to the longest one or to ``length`` tokens.

        A word-level tokenizer tries an unknown word in lower case and ignores punctuation marks: "A cat." is "a cat".

        Raises:
          UserError: if a prompt is empty, too long, or holds a special token or a word that the tokenizer does not
            know.
        """
        encodings = [self._encode(prompt) for prompt in prompts]
        width = length or max(map(len, encodings))
        out = np.full((len(prompts), width), self.pad_id, np.int32)
        mask = np.zeros((len(prompts), width), bool)
        for row, ids in enumerate(encodings):
            if len(ids) > min(width, self.max_length):
                limit = min(width, self.max_length)
                raise UserError(f"prompt too long: {len(ids)} tokens, at most {limit}: {prompts[row][:60]!r}…")
            out[row, width - len(ids) :], mask[row, width - len(ids) :] = ids, True
        return out, mask

    def length(self, prompts: Sequence[str]) -> int:
        """Returns the tokens of the longest prompt. Raises the same errors as the call."""
        return max(self([prompt])[0].shape[1] for prompt in prompts)

    def _encode(self, prompt: str) -> list[int]:
        if not prompt.strip():
            raise UserError("a prompt is empty; say what to draw")
        if any("\ud800" <= sign <= "\udfff" for sign in prompt):  # Python decodes bytes that are not UTF-8 to these
            raise UserError(f"the prompt {prompt[:60]!a} is not UTF-8 text; write it in UTF-8")
        special = next((token for token in self._special if token in prompt), None)
        if special is not None:
            raise UserError(f"a prompt holds {special!r}, a special token of the model; say it in words alone")
        words = prompt.strip() if self._words is None else self._in_known_words(prompt, self._words)
        encoding = self.tokenizer.encode(chat_form(words))
        # Our tokenizers add the begin-of-sentence token; published ones leave it to the calling code.
        ids = encoding.ids if encoding.ids[0] == self._bos else [self._bos, *encoding.ids]
        unknown = self.tokenizer.token_to_id(UNKNOWN)
        if unknown is not None and unknown in ids:
            raise UserError(f"the model's tokenizer cannot write all of the prompt {prompt[:60]!r}; say it otherwise")
        return ids

    def _in_known_words(self, prompt: str, known: frozenset[str]) -> str:
        """Returns a prompt in the words of a word-level tokenizer.

        Raises:
          UserError: if a word is unknown even in lower case, or the prompt has no words.
        """
        words = _spelt(prompt, known)
        unknown = [word for word in dict.fromkeys(words) if word not in known]
        if unknown:
            raise UserError(f"the model does not know {', '.join(map(repr, unknown))}; it knows: {self.known_words()}")
        if not words:
            raise UserError("a prompt is empty; say what to draw")
        return " ".join(words)

    def known_part(self, prompt: str) -> str:
        """Returns the words of a prompt that a word-level tokenizer knows; others know all of it."""
        if self._words is None:
            return prompt
        return " ".join(word for word in _spelt(prompt, self._words) if word in self._words)

    def known_words(self) -> str:
        """Returns the words of a word-level tokenizer, for messages."""
        return " ".join(sorted(w for w in self.tokenizer.get_vocab() if w.isalpha()))


def _spelt(prompt: str, known: frozenset[str]) -> list[str]:
    """Returns the words of a prompt, without punctuation, as a word-level tokenizer spells them where it knows them."""
    text = "".join(sign for sign in prompt if unicodedata.category(sign) != "Cf")  # invisible characters
    found = re.findall(r"\w+(?:['’]\w+)*|[^\w\s]", unicodedata.normalize("NFKC", text))
    words = [word for word in found if word in known or not _is_mark(word)]
    words = [word if word in known else word.lower() for word in words]
    return [part for word in words for part in _known_parts(word, known)]


def _known_parts(word: str, known: frozenset[str]) -> list[str]:
    """Returns the parts of a word with apostrophes if they are known and the word is not; else the word."""
    parts = [word] if word in known else words_in(word)
    return parts if parts and known.issuperset(parts) else [word]


def words_in(text: str) -> list[str]:
    """Returns the words of a text in lower case, without punctuation: "a dog's Ball." gives a, dog, s and ball."""
    text = "".join(sign for sign in text if unicodedata.category(sign) != "Cf")  # invisible characters
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower())
    return [word for word in re.findall(r"\w+|[^\w\s]", text) if not _is_mark(word)]


def _is_mark(word: str) -> bool:
    """Returns whether a word is a single punctuation mark of any script."""
    return len(word) == 1 and unicodedata.category(word).startswith("P")
