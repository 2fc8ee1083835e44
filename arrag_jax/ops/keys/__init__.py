"""Lists the kinds of retrieval key by name. To add a kind, add a file to this folder and a line to ``KEY_KINDS``."""

from arrag_jax.ops.keys.context import CodebookKeys, LatentKeys
from arrag_jax.ops.keys.kind import KeyKind

KEY_KINDS: dict[str, KeyKind] = {
    "codebook": CodebookKeys(),  # vectors of the codebook
    "latent": LatentKeys(),  # outputs of the encoder before quantisation, as in the published code
}
KINDS_BY_FILE = {kind.file: kind for kind in KEY_KINDS.values()}  # ``KeyKind.file`` → the kind whose records it holds
