"""Self-made problems: the answers are true, the corpora as right and as wrong as they are said to be."""

from __future__ import annotations

import ast
import itertools
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from opd_jax.data.tasks import CONNECTIVES, make_task, spell, write_task_tokenizer
from opd_jax.data.tokenizers import load_tokenizer, valid_vocab_size
from opd_jax.errors import InputError
from opd_jax.evaluation.answers import verify

STEP = re.compile(r"(\d+) \* (\d+) = (\d+) (\S+)")


def facts(rows: list[dict[str, str]], modulus: int) -> list[tuple[int, int, int]]:
    """Every fact a · b = c that the responses state."""
    return [(int(a), int(b), int(c)) for row in rows for a, b, c, _ in STEP.findall(row["response"])]


@pytest.mark.parametrize("name", ["products-5x2", "products-13x4", "products-13x4-shaky", "products-23x3"])
def test_problems_and_answers_are_true(name: str) -> None:
    modulus, length = map(int, re.findall(r"\d+", name))
    rows = make_task(name, "train", 300)
    assert len(rows) == 300
    assert len({row["id"] for row in rows}) == 300
    for row in rows:
        product, said = re.fullmatch(r"(.*) mod (\d+) \?", row["problem"]).groups()  # pyright: ignore[reportOptionalMemberAccess]
        numbers = [int(n) for n in product.split(" * ")]
        assert int(said) == modulus
        assert len(numbers) == length
        assert all(1 <= n < modulus for n in numbers)
        assert int(row["answer"]) == math.prod(numbers) % modulus


def test_exact_corpus_is_right_step_by_step() -> None:
    rows = make_task("products-13x4", "train", 500)
    assert all(a * b % 13 == c for a, b, c in facts(rows, 13))
    assert len(facts(rows, 13)) == 3 * 500
    for row in rows[:50]:
        assert row["response"].endswith(f" Answer: {row['answer']}")
        first = row["problem"].split(" * ")
        assert row["response"].startswith(f"{first[0]} * {first[1]} = ")
        assert verify(row["response"], row["answer"])


def test_responses_chain_their_own_results() -> None:
    for row in make_task("products-13x4-shaky", "train", 200):
        steps = STEP.findall(row["response"])
        for (_, _, result, _), (running, _, _, _) in itertools.pairwise(steps):
            assert running == result
        assert row["response"].endswith(f"Answer: {steps[-1][2]}")


def test_shaky_corpus_is_wrong_as_often_as_stated() -> None:
    """Per fact: right always (60 % of facts), with 0.4 (20 %), with 0.1 and one wrong value with 0.55 (20 %)."""
    stated: dict[tuple[int, int], Counter[int]] = {}
    for a, b, c in facts(make_task("products-13x4-shaky", "train", 12_000), 13):
        stated.setdefault((a, b), Counter())[c] += 1
    assert len(stated) == 144
    assert min(sum(v.values()) for v in stated.values()) > 100
    right = {f: v[f[0] * f[1] % 13] / v.total() for f, v in stated.items()}
    kinds = Counter("sure" if r == 1 else "uncertain" if r > 0.25 else "misconceived" for r in right.values())
    error = 3 * math.sqrt(144 * 0.2 * 0.8)
    assert kinds["sure"] == pytest.approx(0.6 * 144, abs=3 * math.sqrt(144 * 0.6 * 0.4))
    assert kinds["uncertain"] == pytest.approx(0.2 * 144, abs=error)
    assert kinds["misconceived"] == pytest.approx(0.2 * 144, abs=error)
    # uniform over 1 … 12 fills the rest, the truth and the distractor included
    for fact, r in right.items():
        if 0.25 < r < 1:
            assert r == pytest.approx(0.4 + 0.6 / 12, abs=0.15)
        elif r <= 0.25:
            truth = fact[0] * fact[1] % 13
            wrong, count = max(((c, n) for c, n in stated[fact].items() if c != truth), key=lambda x: x[1])
            assert wrong in range(1, 13)
            assert count / stated[fact].total() == pytest.approx(0.55 + 0.35 / 12, abs=0.16)


def test_beliefs_do_not_depend_on_the_seed() -> None:
    def sure(seed: int) -> set[tuple[int, int]]:
        seen: dict[tuple[int, int], set[int]] = {}
        for a, b, c in facts(make_task("products-13x4-shaky", "train", 3_000, seed), 13):
            seen.setdefault((a, b), set()).add(c)
        return {f for f, v in seen.items() if v == {f[0] * f[1] % 13}}

    assert sure(0) == sure(1)


def test_connectives_even_in_one_corpus_and_preferred_in_the_other() -> None:
    def shares(name: str) -> np.ndarray:
        words = Counter(s[3] for row in make_task(name, "train", 2_000) for s in STEP.findall(row["response"]))
        assert set(words) <= set(CONNECTIVES)
        return np.array([words[c] / words.total() for c in CONNECTIVES])

    np.testing.assert_allclose(shares("products-13x4-shaky"), 1 / 8, atol=0.02)
    np.testing.assert_allclose(shares("products-13x4"), 0.5 ** np.arange(1, 9) / (1 - 0.5**8), atol=0.03)


def test_train_and_test_are_disjoint_whatever_the_seeds() -> None:
    train = {row["problem"] for seed in range(3) for row in make_task("products-5x3", "train", 300, seed)}
    test = {row["problem"] for seed in range(3) for row in make_task("products-5x3", "test", 100, seed)}
    assert train
    assert test
    assert not train & test


def test_deterministic_and_prefix_stable() -> None:
    rows = make_task("products-13x4", "train", 50, seed=3)
    assert rows == make_task("products-13x4", "train", 50, seed=3)
    assert rows[:20] == make_task("products-13x4", "train", 20, seed=3)
    assert rows != make_task("products-13x4", "train", 50, seed=4)
    assert [r["problem"] for r in rows] != [r["problem"] for r in make_task("products-13x4", "test", 50, seed=3)]
    assert len(make_task("products-5x2", "train", None)) == 16_384


def test_tokenizer_round_trip(tmp_path: Path) -> None:
    size = write_task_tokenizer(tmp_path, "products-13x4")
    tokenizer = load_tokenizer(tmp_path)
    assert valid_vocab_size(tokenizer) == size == len(tokenizer)
    assert tokenizer.eos_token == "<eos>"
    for row in make_task("products-13x4-shaky", "test", 50):
        for text, longest in ((row["problem"], 10), (row["response"], 21)):
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert tokenizer.pad_token_id not in ids  # which stands for the unknown, too
            assert len(ids) <= longest


@pytest.mark.parametrize(
    "name",
    ["products", "products-13", *(f"products-{x}" for x in ("12x4", "13x1", "2x3", "211x2", "5x2-x")), "sums-13x4"],
)
def test_unknown_tasks_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected products-MxN"):
        make_task(name, "train", 1)
    with pytest.raises(InputError, match="unknown task"):
        write_task_tokenizer(tmp_path, name)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(InputError, match="expected train or test"):
        make_task("products-13x4", "validation", 1)


@pytest.mark.parametrize(
    "name", ["sums-1x2", "sums-4x5", "linear-1", "linear-3", "gcd-1", "gcd-6", "spelt-1", "spelt-9"]
)
def test_tasks_in_words_are_true_step_by_step(name: str) -> None:
    rows = make_task(name, "train", 200)
    digits = int(name.split("-")[1][0])
    for row in rows:
        problem, answer = row["problem"], int(row["answer"])
        numbers = [int(n) for n in re.findall(r"\d+", problem)]
        if name.startswith("sums"):
            terms = problem.removeprefix("What is ").removesuffix("?").replace("- ", "-").replace("+ ", "").split()
            assert sum(map(int, terms)) == answer
            assert len(terms) == int(name[-1])
        elif name.startswith("gcd"):
            assert math.gcd(*numbers) == answer
        elif name.startswith("spelt"):
            numbers = [int(n) for n in row["response"].split(" = ")[0].split(" + ")]
            assert problem == f"What is {spell(numbers[0])} plus {spell(numbers[1])}?"
            assert sum(numbers) == answer
        else:
            a, sign, b, c = re.fullmatch(r"Solve (\d+)x ([+-]) (\d+) = (-?\d+) for x\.", problem).groups()  # pyright: ignore[reportOptionalMemberAccess]
            assert int(a) * answer + int(sign + b) == int(c)
        if not name.startswith("linear"):  # its right side is larger
            assert max(numbers) < 10**digits
        steps = row["response"].removesuffix(f". Answer: {answer}").split(", ")
        for step in steps:
            sides = [side.split("x")[0] if side.endswith("x") else side for side in step.split(" = ")]
            values = {value(side) for side in sides[-2:]}
            assert len(values) == 1, step
        assert verify(row["response"], row["answer"])
    assert rows == make_task(name, "train", 200)
    assert not {row["problem"] for row in rows} & {row["problem"] for row in make_task(name, "test", 20)}


def test_numbers_are_spelt() -> None:
    spelt = {
        0: "zero", 10: "ten", 13: "thirteen", 20: "twenty", 45: "forty-five", 100: "one hundred",
        907: "nine hundred seven", 8_040: "eight thousand forty",
        119_215: "one hundred nineteen thousand two hundred fifteen", 60_000_012: "sixty million twelve",
    }  # fmt: skip
    assert {n: spell(n) for n in spelt} == spelt
    assert len({spell(n) for n in range(10_000)}) == 10_000


def value(text: str) -> float:
    """Of a product, a sum or a quotient of integers, by Python's own grammar."""
    node = ast.parse(text, mode="eval").body

    def of(node: ast.AST) -> float:
        if isinstance(node, ast.BinOp):
            left, right = of(node.left), of(node.right)
            operations = {ast.Add: left + right, ast.Sub: left - right, ast.Mult: left * right}
            return operations[type(node.op)] if type(node.op) in operations else left / right
        return float(ast.literal_eval(node))

    return of(node)
