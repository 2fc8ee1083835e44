"""Keeps a picture from copying stored images, whatever draws it: forbids codes that would make a copied run too large.

A *run* is a set of positions that are connected by their sides and whose codes equal those of one stored image at one
displacement. Its size is the number of different codes in it, as in ``evaluation.memorization``: a plain background
equals that of any image and is one code. A code is forbidden if its position would be in a run larger than ``most``. A
run gets its size with the last of its positions, so no run of the finished picture is larger.

The search is exact over all images and displacements. A run that is to grow holds at least ``most`` different codes, so
at least half of these are not among the ``most // 2`` most common ones. The places of all other codes are indexed; a
displaced image that matches the picture at fewer of them than this half cannot hold such a run. Only the few others are
compared in full. The search runs on the host and uses numpy alone (``ops.host``).
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Integer


class CopyIndex:
    """The places of the uncommon codes of M stored images."""

    def __init__(self, codes: Integer[np.ndarray, "M H W"], codebook_size: int, most: int):
        self.grid, self.most, self.size = codes.shape[1:], most, codebook_size
        self.codes = codes.reshape(len(codes), -1)
        height, width = self.grid
        self._across = 2 * width - 1  # displacements to the side
        self._each = (2 * height - 1) * self._across  # displacements of an image
        count = np.bincount(self.codes.reshape(-1), minlength=codebook_size)
        self.common = np.zeros(codebook_size, bool)
        self.common[np.argsort(-count, kind="stable")[: most // 2]] = True
        flat = np.where(self.common[self.codes], codebook_size, self.codes).reshape(-1)
        order = np.argsort(flat, kind="stable")[: int((flat < codebook_size).sum())]
        self._starts = np.searchsorted(flat[order], np.arange(codebook_size + 1))
        image, cell = np.divmod(order, height * width)
        # A displaced image has one number; a position of the picture adds ``_offset`` to what a stored place gives.
        self._places = image * self._each + (self._each - 1) // 2 - self._offset(cell)

    def _offset(self, cell: Any) -> Any:
        row, column = np.divmod(cell, self.grid[1])
        return row * self._across + column

    def forbidden(self, drawn: Int[np.ndarray, "n T"], position: Int[np.ndarray, " n"]) -> Bool[np.ndarray, "n V"]:
        """Returns which codes must not be drawn at a position; only codes before it are read."""
        banned = np.zeros((len(drawn), self.size), bool)
        for row, (codes, at) in enumerate(zip(drawn, position, strict=True)):
            banned[row, self._forbidden(codes, int(at))] = True
        return banned

    def _forbidden(self, drawn: Int[np.ndarray, " T"], position: int) -> Int[np.ndarray, " m"]:
        """Returns the forbidden codes of one picture."""
        nothing, before = np.zeros(0, np.int64), drawn[:position]
        if len(np.unique(before)) < self.most:
            return nothing
        cells = np.flatnonzero(~self.common[before])
        places = [self._places[self._starts[code] : self._starts[code + 1]] for code in before[cells]]
        votes = [each + self._offset(cell) for each, cell in zip(places, cells, strict=True)]
        numbers, count = np.unique(np.concatenate([np.zeros(0, np.int64), *votes]), return_counts=True)
        numbers = numbers[count >= self.most - self.most // 2]
        image, displacement = np.divmod(numbers, self._each)
        down, right = np.divmod(displacement, self._across)
        down, right = down - self.grid[0] + 1, right - self.grid[1] + 1
        code = self._stored(image, down, right, np.array([position]))[:, 0]
        beside = [cell for cell in self._beside(position) if cell < position]
        touching = (self._stored(image, down, right, np.array(beside, np.int64)) == drawn[beside]).any(1)
        wanted = touching & (code >= 0)
        image, down, right, code = (x[wanted] for x in (image, down, right, code))
        equal = self._stored(image, down, right, np.arange(position)) == before
        several = np.flatnonzero(equal.sum(1) >= self.most)
        if not len(several):
            return nothing
        run, code = self._joined(equal[several], position), code[several]
        found = np.sort(np.where(run, before, -1), axis=1)
        size = (found[:, 0] >= 0) + ((found[:, 1:] != found[:, :-1]) & (found[:, 1:] >= 0)).sum(1)
        size += ~(run & (before == code[:, None])).any(1)
        return np.unique(code[size > self.most])

    def _stored(
        self, image: np.ndarray, down: np.ndarray, right: np.ndarray, cells: np.ndarray
    ) -> Int[np.ndarray, "m n"]:
        """Returns the codes that displaced images have at cells of the picture; -1 outside of the image."""
        height, width = self.grid
        row, column = cells[None] // width - down[:, None], cells[None] % width - right[:, None]
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        place = np.clip(row, 0, height - 1) * width + np.clip(column, 0, width - 1)
        return np.where(inside, self.codes[image[:, None], place].astype(np.int64), -1)

    def _beside(self, cell: int) -> list[int]:
        """Returns the drawn neighbours of a position: left and above."""
        width = self.grid[1]
        return [cell - 1] * (cell % width > 0) + [cell - width] * (cell >= width)

    def _joined(self, equal: Bool[np.ndarray, "m t"], position: int) -> Bool[np.ndarray, "m t"]:
        """Returns the cells of ``equal`` that are connected by their sides to the position."""
        height, width = self.grid
        whole = np.zeros((len(equal), height, width), bool)
        whole.reshape(len(equal), -1)[:, :position] = equal
        run = np.zeros_like(whole)
        run.reshape(len(equal), -1)[:, position] = True
        whole.reshape(len(equal), -1)[:, position] = True
        while True:
            grown = run.copy()
            grown[:, 1:] |= run[:, :-1]
            grown[:, :-1] |= run[:, 1:]
            grown[:, :, 1:] |= run[:, :, :-1]
            grown[:, :, :-1] |= run[:, :, 1:]
            grown &= whole
            if (grown == run).all():
                return run.reshape(len(equal), -1)[:, :position]
            run = grown
