"""Maps the path of each of our parameters to its key in a checkpoint layout, and defines the layouts of Janus.

The first table gives the keys of the published Janus-Pro and FAiD checkpoints; our own checkpoints use the same keys.
The second table maps a published key to the key of the ``transformers`` library. Both tables were read off checkpoints.
"""

import dataclasses
import re
from collections.abc import Callable

import numpy as np

Rule = tuple[str, str | Callable[[re.Match], str]]

_LAYER = r"language_model\.layers\.(\d+)\."
# Our path → published key. The first rule that matches is applied.
_PUBLISHED: tuple[Rule, ...] = (
    (
        rf"{_LAYER}attention\.([qv])_lora\.([ab])\.",  # the PEFT library's names, see ``plain_key``
        lambda m: f"language_model.model.layers.{m[1]}.self_attn.{m[2]}_proj.lora_{m[3].upper()}.",
    ),
    (rf"{_LAYER}attention\.([qkvo])\.", r"language_model.model.layers.\1.self_attn.\2_proj."),
    (rf"{_LAYER}mlp\.(\w+)\.", r"language_model.model.layers.\1.mlp.\2_proj."),
    (rf"{_LAYER}input_norm\.", r"language_model.model.layers.\1.input_layernorm."),
    (rf"{_LAYER}mlp_norm\.", r"language_model.model.layers.\1.post_attention_layernorm."),
    (rf"{_LAYER}blender\.norm_scale$", r"language_model.model.layers.\1.retrieval_layernorm.weight"),
    (rf"{_LAYER}blender\.gate\.0\.", r"language_model.model.layers.\1.blender.mlp.0."),
    (rf"{_LAYER}blender\.gate\.1\.", r"language_model.model.layers.\1.blender.mlp.2."),
    (rf"{_LAYER}blender\.", r"language_model.model.layers.\1.blender."),
    (r"language_model\.(embed_tokens|norm)\.", r"language_model.model.\1."),
    (r"gen_aligner\.layers\.(\d+)\.", lambda m: f"gen_aligner.layers.{2 * int(m[1])}."),  # GELUs count there
    (r"gen_head\.layers\.0\.", r"gen_head.output_mlp_projector."),
    (r"gen_head\.layers\.1\.", r"gen_head.vision_head."),
    (r"(gen_vision_model\..*\.(?:up|down)sample)\.", r"\1.conv."),
    (r"gen_vision_model\.codes$", r"gen_vision_model.quantize.embedding.weight"),
)

# Published key → key of the transformers library. Every rule that matches is applied, in this order.
_TRANSFORMERS: tuple[Rule, ...] = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^gen_embed\.", "model.generation_embeddings."),
    (r"^gen_aligner\.layers\.0\.", "model.generation_aligner.fc1."),
    (r"^gen_aligner\.layers\.(\d+)\.", lambda m: f"model.generation_aligner.hidden_layers.{int(m[1]) // 2 - 1}."),
    (r"^gen_head\.output_mlp_projector\.", "model.generation_head.proj_out."),
    (r"^gen_head\.", "model.generation_head."),
    (r"^gen_vision_model\.", "model.vqmodel."),
    (r"^(model\.vqmodel\.encoder)\.conv_blocks\.", r"\1.down."),
    (r"^(model\.vqmodel\.decoder)\.conv_blocks\.", r"\1.up."),
    (r"^(model\.vqmodel\..*)\.res\.", r"\1.block."),
    (r"^(model\.vqmodel\..*)\.mid\.0\.", r"\1.mid.block_1."),
    (r"^(model\.vqmodel\..*)\.mid\.1\.", r"\1.mid.attn_1."),
    (r"^(model\.vqmodel\..*)\.mid\.2\.", r"\1.mid.block_2."),
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names that one kind of checkpoint gives its tensors.

    Attributes:
      names: rules that map the path of one of our parameters to its published key. The leaf of the path (kernel,
        scale, embedding) is renamed "weight" first. The first rule that matches is applied.
      rules: rules that map a published key to the key of this layout. All rules that match are applied, in order.
      parts: our name of each part of the model → prefix of its keys.
      unused: pattern of the keys that generation never needs: the text head, a training counter, the
        image-understanding tower, and the rotary frequencies, which older libraries stored although the base
        determines them.
      exact: parts that stay in float32, whatever dtype the other parts are read or written in. A rounded tokenizer
        maps some images to other codes, so existing datastores would not match it.
      shared: published keys of unused tensors that also have a name in this layout.
      words: key of the parameter with one row per token of the vocabulary; "" = there is none.
      per_code: keys of the parameters with one row per image code.
    """

    names: tuple[Rule, ...]
    rules: tuple[Rule, ...]
    parts: dict[str, str]
    unused: re.Pattern
    exact: tuple[str, ...] = ("gen_vision_model",)
    shared: tuple[str, ...] = ()
    words: str = ""
    per_code: tuple[str, ...] = ()

    def from_published(self, key: str) -> str:
        """Returns the key in this layout of a published key."""
        for pattern, replacement in self.rules:
            key = re.sub(pattern, replacement, key)
        return key

    def key(self, path: str) -> str:
        """Returns the key in this layout of one of our parameters."""
        return self.from_published(self.published(path))

    def published(self, path: str) -> str:
        """Returns the published key of one of our parameters."""
        key = re.sub(r"\.(kernel|scale|embedding)$", ".weight", path)
        for pattern, replacement in self.names:
            key, count = re.subn("^" + pattern, replacement, key)
            if count:
                break
        return key


PUBLISHED = Layout(
    names=_PUBLISHED,
    rules=(),
    parts={name: f"{name}." for name in ("language_model", "gen_vision_model", "gen_embed", "gen_aligner", "gen_head")},
    unused=re.compile(
        r"language_model\.lm_head\.weight|gen_vision_model\.quantize\.codebook_used|(vision_model|aligner)\..*"
        r"|language_model\.model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
    ),
    words="language_model.model.embed_tokens.weight",
    per_code=(
        "gen_vision_model.quantize.embedding.weight",
        "gen_embed.weight",
        "gen_head.vision_head.weight",
        "gen_head.vision_head.bias",
    ),
)
TRANSFORMERS = Layout(
    names=_PUBLISHED,
    rules=_TRANSFORMERS,
    parts={
        "language_model": "model.language_model.",
        "gen_vision_model": "model.vqmodel.",
        "gen_embed": "model.generation_embeddings.",
        "gen_aligner": "model.generation_aligner.",
        "gen_head": "model.generation_head.",
    },
    unused=re.compile(r"lm_head\.weight|model\.(vision_model|aligner)\..*"),
    shared=("language_model.lm_head.weight",),
)


def plain_key(name: str) -> str:
    """Returns a tensor's name without the prefixes and infixes of the PEFT library (docs/reference.md "LoRA").

    An adapter that was saved for the language model alone lacks the prefix "language_model."; it is added.
    """
    key = re.sub(r"base_model\.model\.|\.base_layer(?=\.)|(?<=lora_[AB])\.default(?=\.)", "", name)
    return re.sub(r"^(?=model\.layers\.)", "language_model.", key)


def to_ours(value: np.ndarray, path: str) -> np.ndarray:
    """Returns a published tensor in our axis order; convolution kernels are transposed from OIHW to HWIO."""
    return value.transpose(2, 3, 1, 0) if path.endswith(".kernel") else value


def published_shape(shape: tuple[int, ...], path: str) -> tuple[int, ...]:
    """Returns the shape that ``to_published`` gives a parameter of this shape."""
    return (shape[3], shape[2], *shape[:2]) if path.endswith(".kernel") else tuple(shape)


def to_published(value: np.ndarray, path: str) -> np.ndarray:
    """Returns a parameter in the published axis order; the inverse of ``to_ours``."""
    return np.ascontiguousarray(value.transpose(3, 2, 0, 1) if path.endswith(".kernel") else value)
