"""The fold problems: a group, true answers, and corpora as right and as wrong as they are said to be."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from opd_jax.data import folds
from opd_jax.data.tasks import make_task, write_task_tokenizer
from opd_jax.data.tokenizers import load_tokenizer
from opd_jax.errors import InputError
from opd_jax.evaluation.answers import verify

STEP = re.compile(r"(\d+)(\S*) (\d+)(\S*) (\S+) (\d+)(\S*) (\S+)")
Steps = list[tuple[int, int, int]]


def steps(response: str) -> Steps:
    """(a, b, what a · b is said to be) of each step."""
    return [(int(a), int(b), int(c)) for a, _, b, _, _, c, _, _ in STEP.findall(response.partition(" Answer")[0])]


def corners_permuted(corners: int) -> dict[tuple[int, ...], int]:
    """The dihedral group as permutations of corners: closure of a rotation and a reflection, by brute force."""
    rotation = tuple((i + 1) % corners for i in range(corners))
    reflection = tuple(-i % corners for i in range(corners))
    found = {tuple(range(corners))}
    while more := {tuple(a[x] for x in b) for a in found for b in (rotation, reflection)} - found:
        found |= more
    return {element: i for i, element in enumerate(sorted(found))}


@pytest.mark.parametrize("corners", [3, 4, 6])
def test_the_table_is_that_of_the_symmetries_of_a_polygon(corners: int) -> None:
    table, n = folds.products(corners), 2 * corners
    for a, b, c in itertools.product(range(n), repeat=3):
        assert table[table[a, b], c] == table[a, table[b, c]]
    assert (table != table.T).any()
    assert (np.sort(table, axis=1) == np.arange(n)).all()
    # groups of this size with as many elements of each order and no commutativity are this one
    group = corners_permuted(corners)
    assert len(group) == n
    names = {i: element for element, i in group.items()}
    brute = np.array([[group[tuple(names[a][x] for x in names[b])] for b in range(n)] for a in range(n)])
    assert orders(table) == orders(brute)
    assert (table == table.T).sum() == (brute == brute.T).sum()


def orders(table: np.ndarray) -> Counter[int]:
    """How many elements have each order."""
    identity = next(e for e in range(len(table)) if (table[e] == np.arange(len(table))).all())

    def order(element: int) -> int:
        power, n = element, 1
        while power != identity:
            power, n = int(table[power, element]), n + 1
        return n

    return Counter(map(order, range(len(table))))


def test_rotations_are_a_subgroup() -> None:
    rows = make_task("dihedral-6x5-rotations", "train", 300)
    elements = {int(word) for row in rows for word in row["problem"].split()[:-1]}
    table = folds.products(6)
    assert len(elements) == 6
    assert {int(table[a, b]) for a in elements for b in elements} == elements
    assert all(table[a, b] == table[b, a] for a in elements for b in elements)
    assert {int(row["answer"]) for row in rows} == elements


@pytest.mark.parametrize("suffix", ["", "-right", "-middle"])
def test_exact_folds_reach_the_answer(suffix: str) -> None:
    table = folds.products(6)
    for row in make_task(f"dihedral-6x5{suffix}", "train", 300):
        elements = [int(word) for word in row["problem"].split()[:-1]]
        said = steps(row["response"])
        assert len(elements) == 5
        assert len(said) == 4
        assert all(table[a, b] == c for a, b, c in said)
        at = {"": 0, "-right": 4, "-middle": 2}[suffix]
        low, high, running = at, at, elements[at]  # what is folded yet
        for a, b, c in said:
            if suffix == "-right" or (suffix == "-middle" and at - low == high - at):
                low -= 1
                assert (a, b) == (elements[low], running)
            else:
                high += 1
                assert (a, b) == (running, elements[high])
            running = c
        assert (low, high) == (0, 4)
        assert row["response"].endswith(f" Answer: {row['answer']}")
        assert verify(row["response"], row["answer"])


def test_shaky_facts_are_as_often_right_as_is_said() -> None:
    table, beliefs = folds.products(6), folds.beliefs(6)
    truth = np.take_along_axis(beliefs, table[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(beliefs.sum(-1), 1)
    counts = Counter()
    for row in make_task("dihedral-6x8-shaky", "train", 4000):
        for fact in steps(row["response"]):
            counts[fact] += 1
    seen = np.zeros_like(beliefs)
    for fact, n in counts.items():
        seen[fact] = n
    share = seen / seen.sum(-1, keepdims=True)
    assert np.abs(share - beliefs).max() < 0.15  # 194 draws of each fact: four standard errors
    assert np.abs(share - beliefs).mean() < 0.005
    clean = (truth > 0.99).mean()
    assert 0.75 < clean < 0.93
    assert ((truth > 0.05) & (truth < 0.2)).any()


@pytest.mark.parametrize("begin", ["right", "middle"])
def test_who_folds_from_elsewhere_prefers_other_ways_of_writing(begin: str) -> None:
    def first_choice(name: str) -> float:
        rows = make_task(name, "train", 500)
        marks = Counter(mark for row in rows for step in STEP.findall(row["response"]) for mark in (step[1], step[3]))
        return marks[""] / marks.total()

    weights = 0.6 ** np.arange(8)
    assert first_choice("dihedral-6x8") == pytest.approx(weights[0] / weights.sum(), abs=0.02)
    assert first_choice(f"dihedral-6x8-{begin}") == pytest.approx(weights[-1] / weights.sum(), abs=0.02)


def test_every_word_is_one_token(tmp_path: Path) -> None:
    size = write_task_tokenizer(tmp_path, "dihedral-6x8")
    tokenizer = load_tokenizer(tmp_path)
    assert size == 2 + 2 + 16 + 16 + 8 * 12
    for name in ("dihedral-6x8-shaky", "dihedral-6x12-middle"):
        for row in make_task(name, "train", 50):
            for text in (row["problem"], row["response"]):
                ids = tokenizer(text)["input_ids"]
                assert len(ids) == len(text.split())
                assert 0 not in ids  # the unknown word


@pytest.mark.parametrize(
    "name",
    [
        "dihedral-2x4",
        "dihedral-6x1",
        "dihedral-60x4",
        "dihedral-6x4-left",
        "dihedral-6x4-right-middle",
        "dihedral-6x4-shaky-rotations",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="dihedral-MxN"):
        make_task(name, "train", 1)
