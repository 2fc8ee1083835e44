"""Lists the kinds of retrieval key by name. To add a kind, add a file to this folder and a line to ``KEY_KINDS``."""

from arrag_jax.ops.keys.context import CodebookKeys, ContextKeys, LatentKeys
from arrag_jax.ops.keys.hidden import HiddenKeys
from arrag_jax.ops.keys.kind import KeyKind

HIDDEN = HiddenKeys()
KEY_KINDS: dict[str, KeyKind] = {
    "codebook": CodebookKeys(),  # vectors of the codebook
    "latent": LatentKeys(),  # outputs of the encoder before quantisation, as in the published code
    "hidden": HIDDEN,  # states of the backbone; a folder of their own beside the store's files
}
# The kinds that the image tokenizer gives; a store's own files hold their records.
TOKENIZER_KINDS = {name: kind for name, kind in KEY_KINDS.items() if isinstance(kind, ContextKeys)}
KINDS_BY_FILE = {kind.file: kind for kind in TOKENIZER_KINDS.values()}  # ``KeyKind.file`` → the kind of its records
