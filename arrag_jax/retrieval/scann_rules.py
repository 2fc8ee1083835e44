"""The rules by which a ScaNN index is laid out and searched, for options that leave the choice to them."""

import math

from arrag_jax.config import ScannOptions

WORTH = 12  # the searched leaves hold at least this many times the requested contexts
FLOAT32_SHARE = 0.25  # an index holds float32 up to this share of unique contexts per patch, else int8

BY_RULE = ScannOptions()
EXHAUSTIVE = ScannOptions(exhaustive_below=2**62)  # exact results for any N


def num_leaves(unique: int, options: ScannOptions) -> int:
    """Returns the number of leaves of the tree over ``unique`` contexts; 0 = no tree, every key is scored."""
    if unique < options.exhaustive_below:
        return 0
    return min(options.leaves or round(2 * math.sqrt(unique)), unique)


def num_leaves_to_search(unique: int, requested: int, options: ScannOptions) -> int:
    """Returns how many leaves a search for ``requested`` contexts visits; at least 1."""
    leaves = num_leaves(unique, options)
    enough = -(-WORTH * requested * leaves // unique)
    return max(1, min(options.leaves_to_search or max(25, leaves // 100, enough), leaves))


def bytes_a_number(unique: int, patches: int, options: ScannOptions) -> int:
    """Returns the bytes per number of a key in the index: 4 (float32) or 1 (int8)."""
    if not num_leaves(unique, options):
        return 4  # ScaNN 1.4.2 crashes on int8 without a tree
    return options.bytes_a_number or (4 if unique <= FLOAT32_SHARE * patches else 1)
