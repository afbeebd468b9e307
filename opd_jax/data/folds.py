"""``dihedral-MxN``: products of N symmetries of a regular polygon, which may be worked out in several orders.

    4 3 9 0 ?   →   4b 3 = 7a then 7 9d is 2 so 2c 0 makes 11f . Answer: 11

The group is that of the 2M rotations and reflections of M corners, under arbitrary numbers. It is associative and not
commutative, so that a fold from the left, one from the right (suffix ``-right``) and one from the middle outwards
(``-middle``) are distinct ways of thinking that reach the same answer. Every element may be written in eight ways, and
there are sixteen signs of equality and sixteen connectives: which of them is a matter of style, so that the most
probable tokens of a position have a meaning beyond the first, and so has their order. Who does not fold from the left
prefers them in the opposite order. The answer has one form alone. The suffix ``-rotations`` leaves the reflections out:
the same kind of problem, with a quarter of the facts.

The suffix ``-shaky`` gives the corpus of somebody who has learnt the products badly: 84 % of the facts are right, 8 %
uncertain (right with probability 0.4), 8 % misconceptions (right with probability 0.1, one fixed wrong value with
0.55). No model of the shaky corpus, of whatever size, can know the truth.
"""

from __future__ import annotations

import functools
import re
import zlib
from bisect import bisect
from collections.abc import Callable

import numpy as np

MARKS = ("", *"abcdefg")  # ways of writing an element
EQUALS = ("=", "is", "gives", "→", "makes", "yields", "equals", "means", "==", "≡", "↦", "⇒", "≅", "≈", "~", "||")
CONNECTIVES = ("then", "so", "next", "and", "now", ",", ";", ".", "also", "thus", "hence", "well", "ok", ":", "-", "/")
BEGINNINGS = ("left", "right", "middle")  # of a fold
LARGEST = 50  # the table of facts has (2M)³ entries
NAME = re.compile(r"dihedral-(\d+)x(\d+)(-rotations)?(-shaky)?(-right|-middle)?")
_CLEAN, _UNCERTAIN, _WRONG = 0.84, 0.08, 0.08


def read_name(name: str) -> tuple[int, int, bool, bool, str] | None:
    """(M, N, rotations alone, shaky, where the fold begins), or None for what is no name of such a task."""
    match = NAME.fullmatch(name)
    if not match or not 3 <= int(match[1]) <= LARGEST or int(match[2]) < 2:
        return None
    return int(match[1]), int(match[2]), match[3] is not None, match[4] is not None, (match[5] or "-left")[1:]


def words(corners: int) -> list[str]:
    """All words of prompts and responses, but for the end of a response."""
    elements = [f"{i}{mark}" for mark in MARKS for i in range(2 * corners)]
    return ["?", "Answer:", *EQUALS, *CONNECTIVES, *elements]


def drawer(
    corners: int, length: int, rotations: bool, shaky: bool, begin: str
) -> tuple[Callable[[np.random.Generator], tuple[str, int, Callable[[], str]]], tuple[int, ...]]:
    """Draws (problem, answer, the response when called), and what names the task to a random generator."""
    truth = products(corners)
    drawn_from = _numbers(corners)[0] if rotations else np.arange(2 * corners)
    facts = np.cumsum(beliefs(corners), axis=-1)[..., :-1].tolist()

    def fact(a: int, b: int, luck: float) -> int:
        return bisect(facts[a][b], luck) if shaky else int(truth[a, b])

    def draw(rng: np.random.Generator) -> tuple[str, int, Callable[[], str]]:
        elements = drawn_from[rng.integers(0, len(drawn_from), length)].tolist()
        answer = functools.reduce(lambda a, b: int(truth[a, b]), elements)
        problem = f"{' '.join(map(str, elements))} ?"
        return problem, answer, lambda: _work_out(elements, fact, begin, rng)

    return draw, (zlib.crc32(f"dihedral-{corners}x{length}".encode()), rotations, shaky, BEGINNINGS.index(begin))


@functools.cache
def products(corners: int) -> np.ndarray:
    """[a, b] = a · b: first the symmetry b, then the symmetry a."""
    number = _numbers(corners)
    table = np.zeros((2 * corners, 2 * corners), int)
    for f, i, g, j in np.ndindex(2, corners, 2, corners):  # corner x goes to i + x, or, reflected, to i − x
        table[number[f, i], number[g, j]] = number[f ^ g, (i + (-j if f else j)) % corners]
    return table


def _numbers(corners: int) -> np.ndarray:
    """[reflected or not, i] → the arbitrary number of a symmetry."""
    return np.random.default_rng(corners).permutation(2 * corners).reshape(2, corners)


@functools.cache
def beliefs(corners: int) -> np.ndarray:
    """[a, b, c] = probability that the shaky corpus writes a · b = c; the same for every seed: its author's beliefs."""
    table = products(corners)
    n = len(table)
    rng = np.random.default_rng(corners + 1)
    truth, uniform = np.eye(n)[table], np.full(n, 1 / n)
    kind = rng.choice(3, size=(n, n), p=[_CLEAN, _UNCERTAIN, _WRONG])[..., None]
    distractor = np.eye(n)[(table + rng.integers(1, n, (n, n))) % n]
    return np.select(
        [kind == 0, kind == 1, kind == 2],
        [truth, 0.4 * truth + 0.6 * uniform, 0.1 * truth + 0.55 * distractor + 0.35 * uniform],
    )


def order(length: int, begin: str) -> list[int]:
    """Places of the elements in the order in which a fold takes them: each is next to those before."""
    if begin == "middle":
        middle = length // 2
        return sorted(range(length), key=lambda place: (abs(place - middle), place))
    return list(range(length))[:: -1 if begin == "right" else 1]


def _work_out(elements: list[int], fact: Callable[[int, int, float], int], begin: str, rng: np.random.Generator) -> str:
    luck = iter(rng.random(6 * len(elements)).tolist())

    def one_of(ways: tuple[str, ...]) -> str:
        return ways[bisect(_preferences(len(ways), begin != "left"), next(luck))]

    def written(element: int) -> str:
        return f"{element}{one_of(MARKS)}"

    first, *others = order(len(elements), begin)
    running, steps = elements[first], []
    for place in others:
        a, b = (elements[place], running) if place < first else (running, elements[place])
        running = fact(a, b, next(luck))
        steps.append(f"{written(a)} {written(b)} {one_of(EQUALS)} {written(running)} {one_of(CONNECTIVES)}")
    return f"{' '.join(steps)} Answer: {running}"


@functools.cache
def _preferences(ways: int, reverse: bool) -> list[float]:
    """Cumulative probabilities of ways of writing: each 0.6 times as probable as the one before."""
    weights = 0.6 ** np.arange(ways)
    return np.cumsum((weights[::-1] if reverse else weights) / weights.sum())[:-1].tolist()
