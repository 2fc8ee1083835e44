"""Keeps a picture from copying stored images, whatever draws it: forbids codes that would make a copied run too large.

A *run* is a set of positions that are connected by their sides and whose codes equal those of one stored image at one
displacement. Its size is the number of different codes in it, as in ``evaluation.memorization``: a plain background
equals that of any image and is one code. A code is forbidden if its position would be in a run larger than ``most``. A
run gets its size with the last of its positions, so no run of the finished picture is larger.

The search is exact over all images and displacements. A run that is to grow holds at least ``most`` different codes, so
at least half of these are not among the ``most // 2`` most common ones. The places of all other codes are indexed. A
``_Trail`` counts, for every displaced image, how many of them the picture has at the same positions, and goes on from
position to position. Only displaced images with half of ``most`` are compared in full. The search runs on the host and
uses numpy alone (``ops.host``).
"""

import threading
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
        self._marks = np.zeros(self.displaced, bool)
        self._trails: list[_Trail] = []
        self._lock = threading.Lock()

    def _offset(self, cell: Any) -> Any:
        row, column = np.divmod(cell, self.grid[1])
        return row * self._across + column

    def forbidden(self, drawn: Int[np.ndarray, "n T"], position: Int[np.ndarray, " n"]) -> Bool[np.ndarray, "n V"]:
        """Returns which codes must not be drawn at a position; only codes before it are read.

        Successive rows may be one picture at several positions, as windows ask.
        """
        banned, trail = np.zeros((len(drawn), self.size), bool), _Trail(self)
        with self._lock:
            free = list(self._trails)
            for row, (codes, at) in enumerate(zip(drawn, position, strict=True)):
                if row == 0 or (codes != drawn[row - 1]).any():
                    trail = self._trail(free, codes[:at])
                banned[row, self._forbidden(codes, int(at), trail)] = True
        return banned

    def _trail(self, free: "list[_Trail]", before: Int[np.ndarray, " t"]) -> "_Trail":
        """Takes the trail that has most in common with a picture; makes one if none is free."""
        if not free:
            self._trails.append(_Trail(self))
            return self._trails[-1]
        return free.pop(int(np.argmax([trail.common(before) for trail in free])))

    def places_of(self, code: int, cell: int) -> Int[np.ndarray, " m"]:
        """Returns the numbers of the displaced images that have the code at a cell of the picture."""
        return self._places[self._starts[code] : self._starts[code + 1]] + self._offset(cell)

    def without(self, numbers: Int[np.ndarray, " m"], code: int, cells: list[int]) -> Int[np.ndarray, " k"]:
        """Returns the displaced images among ``numbers`` that have the code at none of the cells."""
        if not cells:
            return numbers
        others = [self.places_of(code, cell) for cell in cells]
        for each in others:
            self._marks[each] = True
        rest = numbers[~self._marks[numbers]]
        for each in others:
            self._marks[each] = False
        return rest

    @property
    def displaced(self) -> int:
        """Number of displaced images."""
        return len(self.codes) * self._each

    def _forbidden(self, drawn: Int[np.ndarray, " T"], position: int, trail: "_Trail") -> Int[np.ndarray, " m"]:
        """Returns the forbidden codes of one picture."""
        nothing, before = np.zeros(0, np.int64), drawn[:position]
        numbers = trail.many(before)
        if not len(numbers):
            return nothing
        image, displacement = np.divmod(numbers, self._each)
        down, right = np.divmod(displacement, self._across)
        down, right = down - self.grid[0] + 1, right - self.grid[1] + 1
        code = self._stored(image, down, right, np.array([position]))[:, 0]
        beside = [cell for cell in self._beside(position) if cell < position]
        touching = (self._stored(image, down, right, np.array(beside, np.int64)) == drawn[beside]).any(1)
        wanted = touching & (code >= 0)
        image, down, right, code = (x[wanted] for x in (image, down, right, code))
        equal = self._stored(image, down, right, np.arange(position)) == before
        several = np.flatnonzero(_different(equal, before) >= self.most)
        if not len(several):
            return nothing
        run, code = self._joined(equal[several], position), code[several]
        size = _different(run, before)
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


class _Trail:
    """How many different indexed codes a picture shares with each displaced image, position by position.

    A picture that grows costs the places of its new codes; other codes are taken back first.
    """

    def __init__(self, index: CopyIndex):
        self._index, self._codes = index, np.zeros(0, np.int64)
        self._count: np.ndarray | None = None  # by displaced image
        self._shared: list[np.ndarray] = []  # what each position added to ``_count``
        self._reached: list[np.ndarray] = []  # which displaced images have had enough from this position on

    def common(self, codes: Int[np.ndarray, " t"]) -> int:
        """Returns the number of leading codes that are equal."""
        number = min(len(codes), len(self._codes))
        differ = np.flatnonzero(codes[:number] != self._codes[:number])
        return int(differ[0]) if len(differ) else number

    def many(self, codes: Int[np.ndarray, " t"]) -> Int[np.ndarray, " m"]:
        """Returns the displaced images that may hold a run of these codes which is as large as it may be."""
        if self._count is None:
            self._count = np.zeros(self._index.displaced, np.uint16)
        start = self.common(codes)
        while len(self._shared) > start:
            self._count[self._shared.pop()] -= 1
            self._reached.pop()
        for cell in range(start, len(codes)):
            self._add(int(codes[cell]), cell, codes[:cell])
        self._codes = np.array(codes)
        return np.concatenate([np.zeros(0, np.int64), *self._reached])

    def _add(self, code: int, cell: int, before: np.ndarray) -> None:
        assert self._count is not None
        if self._index.common[code]:
            shared = np.zeros(0, np.int64)
        else:
            shared = self._index.places_of(code, cell)
            shared = self._index.without(shared, code, np.flatnonzero(before == code).tolist())  # a code counts once
        self._count[shared] += 1
        self._shared.append(shared)
        most = self._index.most
        self._reached.append(shared[self._count[shared] == most - most // 2])


def _different(chosen: Bool[np.ndarray, "m t"], codes: Int[np.ndarray, " t"]) -> Int[np.ndarray, " m"]:
    """Returns the number of different codes at the chosen positions of each row."""
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=-2))
    return np.logical_or.reduceat(chosen[:, order], starts, axis=1).sum(1)
