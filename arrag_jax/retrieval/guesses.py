"""Guesses codes by what stored images hold after the same four codes, for windows (``decode.parallel``).

A draw that was made after a wrong guess is right most of the time, but not inside of an object, where each code follows
from those beside it: there a mistake travels one position per pass. So the guesses of a window are read again from left
to right. A guess stays if some stored image has it after the four codes that now surround it; otherwise the code that
most stored images have there takes its place. This module uses only numpy, because it runs inside host callbacks.
"""

import numpy as np
from jaxtyping import Int, Integer

from arrag_jax.ops import grid as grid_ops
from arrag_jax.retrieval.patches import packed


class SeenContexts:
    """The codes that follow each unique context of M stored images."""

    def __init__(self, codes: Integer[np.ndarray, "M H W"], codebook_size: int):
        height, width = codes.shape[1:]
        self.size, self.width = codebook_size, width
        self.around = grid_ops.context_positions(height, width)
        whole = packed(grid_ops.contexts_of_grids(codes).reshape(-1, 4))
        self.contexts, number = np.unique(whole, return_inverse=True)
        after = grid_ops.next_codes_of_grids(codes).reshape(-1).astype(np.int64)
        self.pairs, count = np.unique(number.reshape(-1) * codebook_size + after, return_counts=True)
        order = np.lexsort((count, self.pairs // codebook_size))  # the most frequent code of each context comes last
        last = np.flatnonzero(np.diff(self.pairs[order] // codebook_size, append=-1))
        self.usual = (self.pairs[order][last] % codebook_size).astype(np.int32)

    def guesses(
        self,
        codes: Int[np.ndarray, "B T"],
        final: Int[np.ndarray, " B"],
        known: Int[np.ndarray, " B"],
        end: Int[np.ndarray, " B"],
    ) -> Int[np.ndarray, "B T"]:
        """Returns the codes with guesses from ``final`` to ``end``, as ``interfaces.Guess`` does."""
        codes, rows, last = codes.copy(), np.arange(len(codes)), codes.shape[1] - 1
        for step in range(int((end - final).max(initial=0))):
            at = np.minimum(final + step, last)
            above, left = codes[rows, np.maximum(at - self.width, 0)], codes[rows, np.maximum(at - 1, 0)]
            guess = np.where(at < known, codes[rows, at], np.where(at >= self.width, above, left))
            around = self.around[at]
            context = packed(codes[rows[:, None], np.maximum(around, 0)])
            number = np.minimum(np.searchsorted(self.contexts, context), len(self.contexts) - 1)
            met = (around[:, 0] >= 0) & (self.contexts[number] == context)
            pair = number * self.size + guess
            held = self.pairs[np.minimum(np.searchsorted(self.pairs, pair), len(self.pairs) - 1)] == pair
            guess = np.where(met & ~((at < known) & held), self.usual[number], guess)
            codes[rows, at] = np.where(final + step < end, np.maximum(guess, 0), codes[rows, at])
        return codes
