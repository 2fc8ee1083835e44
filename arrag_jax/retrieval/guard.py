"""Keeps a picture from copying stored images, whatever draws it: forbids codes that would make a copied run too large.

A *run* is a set of positions that are connected by their sides and whose codes equal those of one stored image at one
displacement. Its size is the number of different codes in it, as in ``evaluation.memorization``: a plain background
equals that of any image and is one code. A code is forbidden if its position would be in a run larger than ``most``. A
run gets its size with the last of its positions, so no run of drawn positions is larger. Codes that were known before
the drawing belong to runs from the start, wherever they are; known codes alone may be a run of any size.

The search is exact over all images and displacements. The codes of a run are connected by *pairs*, two different codes
side by side. A run with more than ``most`` codes has at least ``most`` different pairs, of which its last position adds
two, or four if all codes around it can be known. ``retrieval.pairs`` finds the places of a pair. A ``_Trail`` counts
the different pairs that a picture shares with each displaced image, and goes on from position to position. Only
displaced images with enough of them are compared in full, each by a union-find that grows with the picture (``_Runs``).
The search runs on the host and uses numpy alone (``ops.host``).
"""

import threading

import numpy as np
from jaxtyping import Bool, Int, Integer

from arrag_jax.retrieval.pairs import Pairs

SKIPPED = 4  # common pairs of a picture that are not counted, at most
COMMON = 1000  # places from which on a pair is common
EARLIER = 8  # earlier places of a pair that are looked at, so that it counts once; it may count twice
Step = tuple[int, int]  # a cell and the code that it got


class CopyIndex:
    """What the guard knows of M stored images."""

    def __init__(self, codes: Integer[np.ndarray, "M H W"], codebook_size: int, most: int):
        self.most, self.size, self.pairs = most, codebook_size, Pairs(codes, codebook_size)
        self.skipped = max(0, min(SKIPPED, (most - 2) // 3))
        self._cells = np.arange(len(self.pairs.shift)) * codebook_size
        self._trails: list[_Trail] = []  # those of the last call's pictures first
        self._lock = threading.Lock()

    def forbidden(
        self,
        drawn: Int[np.ndarray, "n T"],
        position: Int[np.ndarray, " n"],
        known: Int[np.ndarray, "n T"] | None = None,
    ) -> Bool[np.ndarray, "n V"]:
        """Returns which codes must not be drawn at a position.

        Successive rows may be one picture at several positions, as windows ask.

        Args:
          drawn: the pictures; only codes before the position are read.
          known: codes that were known before the drawing, -1 elsewhere. Nothing is forbidden where they are.
        """
        banned = np.zeros((len(drawn), self.size), bool)
        used: list[_Trail] = []
        with self._lock:
            free = list(self._trails)
            for row, (codes, at) in enumerate(zip(drawn, position.tolist(), strict=True)):
                own = None if known is None else known[row]
                if own is not None and own[at] >= 0:
                    continue
                steps = self._steps(codes, at, own)
                if not used or (codes != drawn[row - 1]).any():
                    used.append(self._trail(free, steps))
                used[-1].follow(steps, own is not None)
                banned[row, used[-1].forbidden(at)] = True
            self._trails = used + free
        return banned

    def _steps(self, codes: np.ndarray, at: int, known: np.ndarray | None) -> Int[np.ndarray, " t"]:
        """Returns cells and codes of what a picture has, as one number each: known ones, then those before ``at``."""
        if known is None:
            return self._cells[:at] + codes[:at]
        given, before = np.flatnonzero(known >= 0), np.flatnonzero(known[:at] < 0)
        return np.concatenate([self._cells[given] + known[given], self._cells[before] + codes[before]])

    def _trail(self, free: "list[_Trail]", steps: Int[np.ndarray, " t"]) -> "_Trail":
        """Takes the trail that has most in common with a picture; makes one if none is free."""
        if not free:
            return _Trail(self)
        if free[0].length and free[0].common(steps) == free[0].length:
            return free.pop(0)
        return free.pop(int(np.argmax([trail.common(steps) for trail in free])))


class _Trail:
    """What a growing picture has in common with every displaced image.

    Positions are added one by one; others are taken back first.
    """

    def __init__(self, index: CopyIndex):
        self._index, self._pairs, self._enough = index, index.pairs, 0
        self._added = np.zeros(0, np.int64)
        self._steps: list[Step] = []
        self._code = [-1] * len(index.pairs.shift)  # by cell
        self._drawn = np.array(self._code)  # the same
        self._rank = np.zeros_like(self._drawn)  # by cell: the number of the code's bit
        self._bits: dict[int, int] = {}  # a bit for each code that the picture has had
        self._count: np.ndarray | None = None  # different pairs, by displaced image
        self._earlier: dict[Step, list[Step] | None] = {}  # cells of each pair of codes; None if it is skipped
        self._undo: list[tuple[list[np.ndarray], list[Step]]] = []  # what each position added to these two
        self._found = [np.zeros(0, np.intp)]  # displaced images with enough pairs, before and after each position
        self._due = np.zeros(0, np.int64)  # number of positions before which each of these needs no look
        self._runs: dict[int, _Runs] = {}

    @property
    def length(self) -> int:
        """Number of positions."""
        return len(self._steps)

    def common(self, steps: Int[np.ndarray, " t"]) -> int:
        """Returns the number of leading steps that are equal."""
        number = min(len(steps), len(self._added))
        differ = (steps[:number] != self._added[:number]).nonzero()[0]
        return int(differ[0]) if len(differ) else number

    def follow(self, steps: Int[np.ndarray, " t"], known: bool) -> None:
        """Makes these steps the picture; ``known`` says whether codes after a position may be among them."""
        enough, start = self._index.most - self._index.skipped - (4 if known else 2), self.common(steps)
        if self._count is None or enough != self._enough:
            start, self._enough = 0, enough
        if start < self.length:
            self._back(start)
        if self._count is None:
            # A count that overflows has been enough before, so it lists its image twice at worst.
            self._count = np.zeros(self._pairs.displaced, np.uint8 if self._index.most < 2**8 else np.uint16)
        if not start:
            self._found = [np.arange(0 if enough > 0 else self._pairs.displaced)]
        for step in steps[start:].tolist():
            self._add(*divmod(step, self._index.size))
        self._added = steps

    def forbidden(self, cell: int) -> list[int]:
        """Returns the codes that would make a run too large at a cell."""
        numbers, pairs, found = self._found[-1], self._pairs, set()
        if not len(numbers):
            return []
        code, touching = pairs.codes(numbers, cell), np.zeros(len(numbers), bool)
        for other in pairs.beside[cell]:
            if self._code[other] >= 0:
                touching |= pairs.codes(numbers, other) == self._code[other]
        if len(self._due) < len(numbers):
            self._due = np.append(self._due, np.zeros(len(numbers) - len(self._due), np.int64))
        wanted = (touching & (code != pairs.size) & (self._due <= self.length)).nonzero()[0]
        if not len(wanted):
            return []
        lacking = self._index.most - self._different(numbers[wanted])
        self._due[wanted] = self.length + lacking
        large = wanted[lacking <= 0]
        for number, own in zip(numbers[large].tolist(), code[large].tolist(), strict=True):
            if own not in found and self._runs_of(number).size(cell, self._bits.get(own, 0)) > self._index.most:
                found.add(own)
        return list(found)

    def _different(self, numbers: Int[np.ndarray, " m"]) -> Int[np.ndarray, " m"]:
        """Returns how many different codes the picture shares with each displaced image, in runs or not."""
        image, cell = (self._pairs.all_codes(numbers) == self._drawn).nonzero()
        shared = np.zeros((len(numbers), len(self._bits)), bool)
        shared[image, self._rank[cell]] = True
        return shared.sum(1)

    def _runs_of(self, number: int) -> "_Runs":
        runs = self._runs.get(number)
        if runs is None:
            codes = self._pairs.all_codes(np.array([number]))[0].tolist()
            runs = self._runs[number] = _Runs(codes, self._pairs.beside, self.length)
        runs.follow(self._steps, self._bits)
        return runs

    def _back(self, length: int) -> None:
        """Takes all positions from a number on back."""
        assert self._count is not None
        while len(self._steps) > length:
            cell, _ = self._steps.pop()
            self._code[cell] = self._drawn[cell] = -1
            self._found.pop()
            shared, seen = self._undo.pop()
            for numbers in shared:
                self._count[numbers] -= 1
            for pair in seen:
                if not (places := self._earlier[pair]) or len(places) == 1:
                    del self._earlier[pair]
                else:
                    places.pop()
        self._due = np.zeros(0, np.int64)
        self._runs = {number: runs for number, runs in self._runs.items() if runs.began <= length}
        if not length:
            self._bits.clear()
        for runs in self._runs.values():
            runs.back(length)

    def _add(self, cell: int, code: int) -> None:
        assert self._count is not None
        shared, seen, found = [], [], [self._found[-1]]
        for other in self._pairs.beside[cell]:
            if (of := self._code[other]) < 0 or of == code:
                continue
            pair = (min(code, of), max(code, of))
            if (earlier := self._earlier.get(pair, [])) is None:
                continue
            numbers = self._pairs.places(cell, code, other, of)
            seen.append(pair)
            if not earlier and len(numbers) > COMMON and self._may_skip():
                self._earlier[pair] = None
                continue
            for cells in earlier[-EARLIER:]:
                one, two = (self._pairs.codes(numbers, each) != self._code[each] for each in cells)
                numbers = numbers[one | two]
            self._earlier[pair] = [*earlier, (cell, other)]
            count = self._count.take(numbers) + self._count.dtype.type(1)
            self._count[numbers] = count
            shared.append(numbers)
            found.append(numbers[count == self._enough])
        self._steps.append((cell, code))
        self._code[cell] = self._drawn[cell] = code
        self._rank[cell] = self._bits.setdefault(code, 1 << len(self._bits)).bit_length() - 1
        self._undo.append((shared, seen))
        self._found.append(np.concatenate(found) if any(map(len, found[1:])) else found[0])

    def _may_skip(self) -> bool:
        return sum(cells is None for cells in self._earlier.values()) < self._index.skipped


class _Runs:
    """The runs of a picture that equal one displaced image: a union-find of its positions that can go back.

    Attributes:
      began: number of the picture's positions when this was made.
    """

    def __init__(self, codes: list[int], beside: list[tuple[int, ...]], began: int):
        self.began, self._codes, self._beside, self._followed = began, codes, beside, 0
        self._parent: dict[int, int] = {}  # by cell; a root is its own
        self._codes_of: dict[int, int] = {}  # by root: the different codes of a run, a bit each
        self._undo: list[tuple[int, int, int, int]] = []  # number of the step, child, its root, the root's codes before

    def follow(self, steps: list[Step], bits: dict[int, int]) -> None:
        """Adds the positions of a picture that are new."""
        for number in range(self._followed, len(steps)):
            cell, code = steps[number]
            if self._codes[cell] == code:
                self._join(number, cell, bits[code])
        self._followed = len(steps)

    def back(self, length: int) -> None:
        """Takes all positions from a number on back."""
        while self._undo and self._undo[-1][0] >= length:
            _, child, root, codes = self._undo.pop()
            if child == root:
                del self._parent[child]
            else:
                self._parent[child], self._codes_of[root] = child, codes
        self._followed = min(self._followed, length)

    def size(self, cell: int, bit: int) -> int:
        """Returns the size that the run of a cell would have with a code; ``bit`` is 0 if the code is a new one."""
        codes = 0
        for other in self._beside[cell]:
            if other in self._parent:
                codes |= self._codes_of[self._root(other)]
        return (codes | bit).bit_count() + (not bit)

    def _join(self, number: int, cell: int, bit: int) -> None:
        self._parent[cell], self._codes_of[cell] = cell, bit
        self._undo.append((number, cell, cell, 0))
        for other in self._beside[cell]:
            if other in self._parent and (root := self._root(other)) != (own := self._root(cell)):
                self._undo.append((number, own, root, self._codes_of[root]))
                self._parent[own] = root
                self._codes_of[root] |= self._codes_of[own]

    def _root(self, cell: int) -> int:
        while (above := self._parent[cell]) != cell:
            cell = above
        return cell
