"""WordNet 3.0: nouns with their glosses, the tree of hypernyms, and similarity in it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

from reattend.assets.store import asset_path

FOLDER = "usr/share/wordnet"


@dataclass(frozen=True)
class Synset:
    """A sense: its words, its definition (without examples), and the senses above it."""

    words: tuple[str, ...]
    definition: str
    hypernyms: tuple[int, ...]


class Nouns:
    """All 82,115 noun synsets by their number (offset in the data file)."""

    def __init__(self, synsets: dict[int, Synset]) -> None:
        self.synsets = synsets
        self._ancestors: dict[int, dict[int, int]] = {}
        self._depths: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.synsets)

    def __getitem__(self, number: int) -> Synset:
        return self.synsets[number]

    @cached_property
    def children(self) -> dict[int, tuple[int, ...]]:
        """The senses directly below each sense."""
        below: dict[int, list[int]] = {number: [] for number in self.synsets}
        for number, synset in self.synsets.items():
            for parent in synset.hypernyms:
                below[parent].append(number)
        return {number: tuple(numbers) for number, numbers in below.items()}

    def ancestors(self, number: int) -> dict[int, int]:
        """Each sense above, and the sense itself, with its distance in steps."""
        if number not in self._ancestors:
            steps = {number: 0}
            for parent in self.synsets[number].hypernyms:
                for above, distance in self.ancestors(parent).items():
                    steps[above] = min(steps.get(above, distance + 1), distance + 1)
            self._ancestors[number] = steps
        return self._ancestors[number]

    def depth(self, number: int) -> int:
        """Steps of the longest way up to a root."""
        if number not in self._depths:
            parents = self.synsets[number].hypernyms
            self._depths[number] = 1 + max(map(self.depth, parents)) if parents else 0
        return self._depths[number]

    def wu_palmer(self, first: int, second: int) -> float:
        """Similarity of two senses in (0, 1]: 2 d / (a + b) (Wu and Palmer 1994).

        d is the depth of the deepest common ancestor, counted from 1 at the root; a and b are d plus
        the steps from each sense up to it. Senses without a common ancestor have similarity 0.
        """
        above_first, above_second = self.ancestors(first), self.ancestors(second)
        common = above_first.keys() & above_second.keys()
        if not common:
            return 0.0
        meeting = max(common, key=lambda n: (self.depth(n), -above_first[n] - above_second[n], n))
        depth = self.depth(meeting) + 1
        return 2 * depth / (2 * depth + above_first[meeting] + above_second[meeting])


@cache
def nouns() -> Nouns:
    """Read the nouns (2 s, once a process).

    Raises:
        AssetError: when the asset "wordnet" has not been fetched.
    """
    lines = (asset_path("wordnet") / FOLDER / "data.noun").read_text(encoding="utf8").splitlines()
    return Nouns(dict(_synset(line) for line in lines if not line.startswith(" ")))


def _synset(line: str) -> tuple[int, Synset]:
    """One line: number, file, kind, words with their sense numbers, pointers, gloss."""
    data, _, gloss = line.partition("|")
    fields = data.split()
    words = int(fields[3], 16)
    names = tuple(name.replace("_", " ") for name in fields[4 : 4 + 2 * words : 2])
    pointers = fields[5 + 2 * words :]
    hypernyms = tuple(
        int(number)
        for kind, number in zip(pointers[::4], pointers[1::4], strict=False)
        if kind in ("@", "@i")
    )
    definition = gloss.partition('; "')[0].strip()
    return int(fields[0]), Synset(names, definition, hypernyms)
