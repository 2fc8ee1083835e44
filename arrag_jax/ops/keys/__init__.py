"""The kinds of key by which patches are found, by name; a further kind is a file beside these and a line here."""

from arrag_jax.ops.keys.context import CodebookKeys, LatentKeys
from arrag_jax.ops.keys.kind import KeyKind

KEY_KINDS: dict[str, KeyKind] = {
    "codebook": CodebookKeys(),  # rows of the codebook
    "latent": LatentKeys(),  # the encoder's outputs before quantisation: the published choice
}
