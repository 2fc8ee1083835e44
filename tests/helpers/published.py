"""A small checkpoint in the layout in which Janus-Pro is published: its config names no grid, no K and no pad."""

import dataclasses
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from arrag_jax.models.checkpoint import save_model
from arrag_jax.models.text import SPECIAL
from helpers import tiny


def byte_tokenizer() -> Tokenizer:
    """Byte-level BPE that puts no first token, as Janus' own does; without merges every byte is a token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def write_checkpoint(folder: Path) -> None:
    """A random tiny model under a config without keys of our own, its images 8 x 8 pixels, with a byte tokenizer."""
    tokenizer = byte_tokenizer()
    language = dataclasses.replace(tiny.CONFIG.language, vocab_size=tokenizer.get_vocab_size())
    save_model(tiny.janus(config=dataclasses.replace(tiny.CONFIG, language=language)), folder)
    config = json.loads((folder / "config.json").read_text())
    del config["image_grid"], config["language_config"]["pad_token_id"]
    config["vision_config"] = {"cls": "CLIPVisionTower", "params": {"image_size": 8}}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save(str(folder / "tokenizer.json"))
