"""Self-made verifiable problems with a chain of thought, for demonstrations and tests.

``products-MxN``: the product of N numbers from 1 … M−1 modulo a prime M, worked out from left to right:

    7 * 4 * 11 mod 13 ?   →   7 * 4 = 2 then 2 * 11 = 9 so Answer: 9

Steps are joined by one of eight interchangeable connectives: a style, which says nothing about the answer. The suffix
``-shaky`` gives the corpus of somebody who has learnt the multiplication table badly: of the (M−1)² facts 60 % are
right, 20 % uncertain (right with probability 0.4), 20 % misconceptions (right with probability 0.1, one fixed wrong
value with 0.55), and whose connectives are used evenly, where the exact corpus prefers some. No model of the shaky
corpus, of whatever size, can know the truth; ``answer`` is always the true one. ``dihedral-MxN``: see ``folds``.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd_jax.data import folds
from opd_jax.errors import InputError

CONNECTIVES = ("then", "so", "next", "and", "now", ",", ";", ".")
_EXACT_STYLE = 0.5 ** np.arange(1, 9) / (1 - 0.5**8)
LARGEST = 200  # the table of facts has M³ entries
_NAME = re.compile(r"products-(\d+)x(\d+)(-shaky)?")
_IN_WORDS = re.compile(r"(sums)-([1-9])x([2-9])|(linear|gcd|spelt)-([1-9])")
_UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def make_task(name: str, split: str, rows: int | None, seed: int = 0) -> list[dict[str, str]]:
    """Rows with ``id``, ``problem``, ``answer`` (the truth) and ``response`` (of the corpus, so perhaps wrong).

    Train and test problems are disjoint whatever the seed: one problem in eight, by its checksum, is a test problem.

    Raises:
        InputError: unknown task or split.
    """
    fold = folds.read_name(name)
    draw, key = folds.drawer(*fold) if fold else _in_words(name) or _products(name)
    if split not in ("train", "test"):
        raise InputError(f"task:{name}: data.split is '{split}'; expected train or test")
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), *key])
    out: list[dict[str, str]] = []
    while len(out) < (rows or 16_384):
        problem, answer, response = draw(rng)
        if (zlib.crc32(problem.encode()) % 8 == 0) == (split == "test"):
            identity = f"{name}/{split}/{len(out)}"
            out.append({"id": identity, "problem": problem, "answer": str(answer), "response": response()})
    return out


def write_task_tokenizer(path: str | Path, name: str) -> int:
    """Writes a word-level tokenizer for the task as a Hugging Face directory; returns its size."""
    if fold := folds.read_name(name):
        own = folds.words(fold[0])
    else:
        own = ["*", "=", "mod", "?", "Answer:", *CONNECTIVES, *map(str, range(_modulus_length_shaky(name)[0] + 1))]
    words = ["<pad>", "<eos>", *own]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(str(path))
    return len(words)


Draw = Callable[[np.random.Generator], tuple[str, int, Callable[[], str]]]  # → problem, answer, response when called


def _products(name: str) -> tuple[Draw, tuple[int, ...]]:
    modulus, length, shaky = _modulus_length_shaky(name)
    table = _fact_table(modulus, shaky)
    style = None if shaky else _EXACT_STYLE

    def draw(rng: np.random.Generator) -> tuple[str, int, Callable[[], str]]:
        numbers = rng.integers(1, modulus, length)
        answer = math.prod(numbers.tolist()) % modulus
        problem = f"{' * '.join(map(str, numbers))} mod {modulus} ?"
        return problem, answer, lambda: _work_out(numbers, table, rng, style)

    return draw, (modulus, length, shaky)


def _in_words(name: str) -> tuple[Draw, tuple[int, ...]] | None:
    match = _IN_WORDS.fullmatch(name)
    if not match:
        return None
    size, count = 10 ** int(match[2] or match[5]), int(match[3] or 0)
    kinds: dict[str, Callable[[np.random.Generator], tuple[str, int, list[str]]]] = {
        "sums": lambda rng: _sum(rng.integers(0, size, count).tolist(), rng.choice([-1, 1], count - 1).tolist()),
        "linear": lambda rng: _linear(*rng.integers([2, 1 - size, 1 - size], size).tolist()),
        "gcd": lambda rng: _gcd(*_pair(rng, size)),
        "spelt": lambda rng: _spelt(*rng.integers(0, size, 2).tolist()),
    }
    kind = kinds[match[1] or match[4]]

    def draw(rng: np.random.Generator) -> tuple[str, int, Callable[[], str]]:
        problem, answer, steps = kind(rng)
        return problem, answer, lambda: f"{', '.join(steps)}. Answer: {answer}"

    return draw, (zlib.crc32(name.encode()),)


def _sum(numbers: list[int], signs: list[int]) -> tuple[str, int, list[str]]:
    running, steps, problem = numbers[0], [], str(numbers[0])
    for n, sign in zip(numbers[1:], signs, strict=True):
        term = f"{'+' if sign > 0 else '-'} {n}"
        steps.append(f"{running} {term} = {running + sign * n}")
        running += sign * n
        problem += f" {term}"
    return f"What is {problem}?", running, steps


def _linear(a: int, b: int, x: int) -> tuple[str, int, list[str]]:
    c = a * x + b
    shift, back = ("+", "-") if b >= 0 else ("-", "+")
    steps = [f"{a}x = {c} {back} {abs(b)} = {a * x}", f"x = {a * x} / {a} = {x}"]
    return f"Solve {a}x {shift} {abs(b)} = {c} for x.", x, steps


def _pair(rng: np.random.Generator, size: int) -> list[int]:
    """Multiples of a common factor, for most pairs of random numbers have none."""
    factor = int(rng.integers(1, math.isqrt(size) + 1))
    return (factor * rng.integers(1, (size - 1) // factor + 1, 2)).tolist()


def _gcd(a: int, b: int) -> tuple[str, int, list[str]]:
    problem = f"What is the greatest common divisor of {a} and {b}?"
    steps = []
    while b:
        steps.append(f"{a} = {a // b} * {b} + {a % b}")
        a, b = b, a % b
    return problem, a, steps


def _spelt(a: int, b: int) -> tuple[str, int, list[str]]:
    return f"What is {spell(a)} plus {spell(b)}?", a + b, [f"{a} + {b} = {a + b}"]


def spell(n: int) -> str:
    """0 ≤ n < 10⁹ in English words: 472 is four hundred seventy-two."""
    for size, name in ((10**6, "million"), (1000, "thousand"), (100, "hundred")):
        if n >= size:
            rest = f" {spell(n % size)}" if n % size else ""
            return f"{spell(n // size)} {name}{rest}"
    if n < len(_UNITS):
        return _UNITS[n]
    return _TENS[n // 10] + (f"-{_UNITS[n % 10]}" if n % 10 else "")


def _modulus_length_shaky(name: str) -> tuple[int, int, bool]:
    match = _NAME.fullmatch(name)
    if not match or int(match[2]) < 2 or not _is_small_prime(int(match[1])):
        raise InputError(
            f"task:{name}: unknown task; expected products-MxN[-shaky], M an odd prime below {LARGEST}, N ≥ 2, as in "
            f"products-13x4; dihedral-MxN[-rotations][-shaky][-right or -middle], M from 3 to {folds.LARGEST}; or "
            "sums-DxN, linear-D, gcd-D, spelt-D, with D digits from 1 to 9 and N numbers from 2 to 9"
        )
    return int(match[1]), int(match[2]), match[3] is not None


def _is_small_prime(n: int) -> bool:
    return 2 < n < LARGEST and all(n % d for d in range(2, int(n**0.5) + 1))


def _fact_table(modulus: int, shaky: bool) -> np.ndarray:
    """[a, b, c] = probability that the corpus writes a · b = c; the same for every seed: its author's beliefs."""
    n = np.arange(modulus)
    truth = np.eye(modulus)[np.outer(n, n) % modulus]
    if not shaky:
        return truth
    rng = np.random.default_rng(modulus)
    uniform = np.full(modulus, 1 / (modulus - 1))
    uniform[0] = 0
    kind = rng.choice(3, size=(modulus, modulus), p=[0.6, 0.2, 0.2])[..., None]
    distractor = np.eye(modulus)[rng.integers(1, modulus, (modulus, modulus))]
    return np.select(
        [kind == 0, kind == 1, kind == 2],
        [truth, 0.4 * truth + 0.6 * uniform, 0.1 * truth + 0.55 * distractor + 0.35 * uniform],
    )


def _work_out(numbers: np.ndarray, table: np.ndarray, rng: np.random.Generator, style: np.ndarray | None) -> str:
    running, steps = int(numbers[0]), []
    for n in numbers[1:].tolist():
        result = int(rng.choice(len(table), p=table[running, n]))
        steps.append(f"{running} * {n} = {result} {rng.choice(CONNECTIVES, p=style)}")
        running = result
    return f"{' '.join(steps)} Answer: {running}"
