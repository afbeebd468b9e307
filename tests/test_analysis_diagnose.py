"""Both conditions from known numbers; a student that is its teacher; what a teacher's settings say; what is told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from transformers import AutoTokenizer

from opd_jax.analysis import diagnose as module
from opd_jax.analysis import first_update as update
from opd_jax.analysis import verdicts
from opd_jax.analysis.diagnose import (
    COMPATIBLE,
    DOUBT,
    FAILS,
    HOLDS,
    MEASURED,
    THRESHOLDS,
    UNKNOWN,
    check_scoring,
    compare_settings,
    diagnose,
    fading,
    judged,
    knowledge,
    ranked,
    verdict,
)
from opd_jax.analysis.pair import Drawn, Sampling, check_pair, draw_rollouts, load_panel
from opd_jax.config import Objective
from opd_jax.config_files import parse_data
from opd_jax.evaluation.answers import AnswerPool
from opd_jax.evaluation.heldout import Panel
from opd_jax.losses import reference_loss
from opd_jax.models.decoder import head
from opd_jax.models.hf import load_model, save_model
from opd_jax.sampling.packing import pack
from opd_jax.sampling.states import hidden_states

SOURCE = parse_data(f"task:{tiny_runs.TASK}", ("chat=false", "limit=12"))
SAMPLING = Sampling(samples=2, max_response=10, fallback_number=True)
SETTINGS: dict[str, Any] = {"batch": 24, "dtype": "float32"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def result(models: Path) -> dict[str, Any]:
    return diagnose(models / "student", [models / "teacher", models / "student"], SOURCE, SAMPLING, **SETTINGS)


def test_a_student_that_is_its_teacher(result: dict[str, Any]) -> None:
    assert result == json.loads(json.dumps(result, allow_nan=False))
    row = result["teachers"][1]
    numbers = {name: of["mean"] for name, of in row["metrics"].items()}
    assert numbers["overlap_ratio"] == 1
    for name in ("entropy_gap", "reverse_kl", "forward_kl", "overlap_advantage"):
        assert abs(numbers[name]) < 1e-5
    assert row["same"]
    assert row["new_knowledge"] == FAILS
    assert row["knowledge"]["accuracy_gain"]["value"] == row["knowledge"]["net"]["value"] == 0
    assert row["of_teacher"] == result["of_student"]
    told = " ".join(verdicts.section(result).lead)
    assert "student: it says the same as the student: overlap 1.000, entropy gap 0.000 nats" in told
    assert "There is nothing to learn." in told


def test_another_teacher(result: dict[str, Any]) -> None:
    row = result["teachers"][0]
    assert row["scoring"]["repeats"] is True
    assert row["scoring"]["packing"] < 1e-3
    assert set(row["metrics"]) == set(row["by_depth"]) == set(MEASURED)
    for name, ranges in row["by_depth"].items():
        tokens = np.array([r["tokens"] for r in ranges])
        mean = np.array([r["mean"] or 0.0 for r in ranges]) @ tokens / tokens.sum()
        assert mean == pytest.approx(row["metrics"][name]["mean"], rel=1e-5, abs=1e-7)  # no token is lost
    assert not row["same"]
    gain = row["of_teacher"]["accuracy"] - result["of_student"]["accuracy"]
    assert row["knowledge"]["accuracy_gain"]["value"] == pytest.approx(gain)
    settings = row["settings"]
    assert (settings["outputs"], settings["tokens"]) == ([24, 32], tiny_runs.VOCAB)
    assert settings["prompts_differ"] == 0
    shown = verdicts.section(result)
    assert sorted(result["ranking"]) == ["student", "teacher"]
    assert [t.title for t in shown.tables][-1] == "conditions"
    assert [len(plot.draw().axes) for plot in shown.plots] == [1] * 6
    for table in shown.tables:
        assert {len(row) for row in table.rows} == {len(table.columns)}


def test_first_update_by_brute_force(models: Path, result: dict[str, Any]) -> None:
    """Norm and coherence of the rollouts' gradients through ``reference_loss``, unprojected."""
    row = result["teachers"][0]
    found, pair = row["first_update"], check_pair(models / "student", [models / "teacher"], **SETTINGS)
    panel, _ = load_panel(pair, SOURCE, SAMPLING)
    with AnswerPool(1, fallback_number=True) as pool:
        drawn = draw_rollouts(pair, pair.load(pair.student), panel, pool, SAMPLING, "")
    (p, c), (q, d) = (load_model(models / name) for name in ("student", "teacher"))
    rows = pack(jax.tree.map(lambda x: np.asarray(x)[: panel.rows : 2], drawn.rollouts), separate=True)

    @jax.jit
    def gradient(mask: Any) -> Any:
        def loss(p: Any) -> Any:
            hidden = [hidden_states(w, k, rows) for w, k in ((p, c), (q, d))]
            sides = hidden[0], head(p), hidden[1], head(q)
            return reference_loss(*sides, rows.targets, mask, Objective(), vocab_size=tiny_runs.VOCAB)[0]

        return jnp.concatenate([g.ravel() for g in jax.tree.leaves(jax.grad(loss)(p))])

    g = np.array([gradient(rows.mask & (np.arange(12) == i)[:, None]) for i in range(12)])
    assert (found["rollouts"], found["tokens"]) == (12, rows.mask.sum())
    norm, norms = np.linalg.norm(g.sum(0)), np.linalg.norm(g, axis=1)
    assert found["norm"]["value"] == pytest.approx(norm / found["tokens"], rel=0.02)
    of = found["coherence"]
    assert of["coherence"]["value"] == pytest.approx(norm / norms.sum(), rel=0.02)
    assert of["orthogonal"]["value"] == pytest.approx(np.sqrt((norms**2).sum()) / norms.sum(), rel=1e-4)
    assert result["teachers"][1]["first_update"] is None  # a student that is its own teacher has no gradient
    size, theirs = (sum(x.size for x in jax.tree.leaves(w)) for w in (p, q))
    assert sum(row["step"]["bytes"].values()) == 4 * (5 * size + theirs)
    assert all(row["step"][kind][name] > 0 for kind in ("flops", "seconds") for name in ("rollout", "score", "update"))
    shown = {t.title: t for t in verdicts.section(result).tables}
    table = shown["first update: gradients of the full KL, one rollout of each problem"]
    assert table.rows[0][3] == found["norm"]["value"]


def test_first_update_that_does_not_fit_loses_nothing(
    models: Path, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.\nand a table")

    monkeypatch.setattr(module, "first_update", refuse)
    found = diagnose(models / "student", [models / "teacher"], SOURCE, SAMPLING, **SETTINGS)["teachers"][0]
    assert found["first_update"] is None
    assert found["knowledge"] == result["teachers"][0]["knowledge"]
    warned = " ".join(capsys.readouterr().err.split())
    assert "the first update is not measured" in warned
    assert "Out of memory allocating 7 bytes.)" in warned


def test_first_update_is_of_the_weights_as_they_are_stored(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of those that were rounded to sample and score."""
    pair = check_pair(models / "student", [models / "teacher"], batch=4, dtype="bfloat16")
    student, teacher = pair.load(models / "student"), pair.load(models / "teacher")
    seen = []

    def backward(params: Any, *_: Any) -> tuple[np.ndarray, float]:
        seen.append(params)
        return np.ones(3), 3.0

    monkeypatch.setattr(update, "_passes", lambda *_: (lambda *_: jnp.zeros(1), backward))
    update.first_update(pair, student, teacher, make_drawn())
    jax.tree.map(np.testing.assert_array_equal, seen[0], load_model(models / "student")[0])


def test_sketches_of_gradients_in_one_hidden_coordinate() -> None:
    """Of 266,240 weights, with nearly all of their gradients in one column of 512."""
    rng = np.random.default_rng(0)
    g = 0.01 * rng.normal(size=(2, 520, 512))
    g[:, :, 100] += 10 * rng.normal(size=(2, 520)) + 5 * rng.normal(size=520)
    flat, sketches = (x.reshape(2, -1) for x in (g, np.array([update.sketched([jnp.asarray(x)]) for x in g])))
    exact, found = (x @ x.T for x in (flat, sketches.astype(np.float64)))
    scale = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    assert np.abs((found - exact) / scale).max() < 0.01


def test_settings_of_a_teacher(models: Path, tmp_path: Path) -> None:
    """One with a chat template of its own, another end-of-sequence, and more output ids."""
    tokenizer = AutoTokenizer.from_pretrained(models / "student")
    template = "{{{{ messages[0].content }}}} {}"
    for name, mark in (("student", "?"), ("teacher", "so")):
        tokenizer.chat_template = template.format(mark)
        tokenizer.eos_token = "<eos>" if name == "student" else "?"
        tokenizer.save_pretrained(tmp_path / f"{name}-tokenizer")
        network = tiny_runs.STUDENT if name == "student" else tiny_runs.TEACHER
        params = tiny_runs.params_of(network, 0)
        save_model(tmp_path / name, params, network, tokenizer_from=tmp_path / f"{name}-tokenizer")
    pair = check_pair(tmp_path / "student", [tmp_path / "teacher"], **SETTINGS)
    data = SOURCE.model_copy(update={"chat": True, "limit": 3})
    panel, _ = load_panel(pair, data, SAMPLING)
    found = compare_settings(pair, pair.teachers[0], data, panel)
    assert found["prompts_differ"] == 3
    assert found["special"]["eos"] == [1, 5]
    assert found["stops"] == [[1], [5]]
    assert compare_settings(pair, pair.student, data, panel)["prompts_differ"] == 0


def rolled(correct: list[list[int]]) -> Any:
    return SimpleNamespace(verdicts=[], correct=np.array(correct, bool))


def test_knowledge() -> None:
    student = rolled([[0, 0], [1, 0], [1, 1], [0, 0], [0, 0]])
    teacher = rolled([[1, 0], [1, 1], [0, 0], [0, 0], [1, 1]])
    rewards = {"reward": np.arange(10.0)[:, None]}
    found = knowledge(student, teacher, rewards)
    of = found["knowledge"]
    assert (of["new"]["value"], of["lost"]["value"], of["net"]["value"]) == (2 / 5, 1 / 5, pytest.approx(1 / 5))
    assert of["accuracy_gain"]["value"] == pytest.approx((0.5 + 0.5 - 1 + 0 + 1) / 5)
    right = [2, 4, 5]
    expected = np.mean([a > b for a in right for b in {*range(10)} - {*right}])
    assert found["reward"]["auroc"]["value"] == pytest.approx(expected)
    assert of["told_apart"]
    never = rolled([[0, 0]] * 5)
    found = knowledge(never, never, rewards)
    assert not found["knowledge"]["told_apart"]
    assert found["reward"] is None
    unanswered: Any = SimpleNamespace(verdicts=None)
    assert knowledge(unanswered, unanswered, rewards) == {"knowledge": None, "reward": None}


@pytest.mark.parametrize(
    ("value", "low", "high", "name", "expected"),
    [
        (0.8, 0.75, 0.85, "overlap_ratio", HOLDS),
        (0.71, 0.69, 0.73, "overlap_ratio", DOUBT),
        (0.65, 0.62, 0.68, "overlap_ratio", DOUBT),
        (0.5, 0.45, 0.55, "overlap_ratio", FAILS),
        (0.1, 0.05, 0.15, "accuracy_gain", HOLDS),
        (0.1, -0.05, 0.25, "accuracy_gain", DOUBT),
        (-0.1, -0.15, -0.05, "accuracy_gain", FAILS),
        (0.0, math.nan, math.nan, "accuracy_gain", FAILS),
        (0.5, math.nan, math.nan, "accuracy_gain", DOUBT),
    ],
)
def test_verdicts(value: float, low: float, high: float, name: str, expected: str) -> None:
    assert verdict(value, low, high, THRESHOLDS[name]) == expected


def ranges(values: list[float], error: float = 0.01, tokens: int = 100) -> list[dict[str, Any]]:
    return [
        {"start": 10 * i, "end": 10 * i + 10, "mean": v, "error": error, "tokens": tokens} for i, v in enumerate(values)
    ]


def test_fading() -> None:
    growing = ranges([0.1, 0.2, 0.3, 0.4])
    found = fading({"overlap_ratio": ranges([0.8, 0.79, 0.7, 0.6]), "reverse_kl": growing})
    assert found == {"from": 20, "drop": pytest.approx(0.1), "error": pytest.approx(0.01 * math.sqrt(2))}
    assert fading({"overlap_ratio": ranges([0.8, 0.6, 0.5, 0.8]), "reverse_kl": growing}) is None  # it comes back
    assert fading({"overlap_ratio": ranges([0.8, 0.6, 0.5, 0.4]), "reverse_kl": ranges([0.1] * 4)}) is None
    assert fading({"overlap_ratio": ranges([0.8, 0.4], error=0.3), "reverse_kl": growing}) is None  # who knows
    assert fading({"overlap_ratio": ranges([0.8, 0.4], tokens=5), "reverse_kl": growing}) is None


def numbers(overlap: float, mass: float, gain: float | None, error: float = 0.01) -> dict[str, Any]:
    metrics = {name: {"mean": 0.5, "error": error} for name in MEASURED}
    metrics |= {"overlap_ratio": {"mean": overlap, "error": error}, "overlap_mass_student": {"mean": mass, "error": 0}}
    row: dict[str, Any] = {"metrics": metrics, "by_depth": {"overlap_ratio": [], "reverse_kl": []}, "knowledge": None}
    if gain is not None:
        held = {"value": gain, "low": gain - 0.02, "high": gain + 0.02}
        row["knowledge"] = {"accuracy_gain": held, "told_apart": True}
    return row


def test_conditions() -> None:
    found = judged(numbers(0.9, 0.99, 0.3), 64, 16)
    assert (found["compatible"]["verdict"], found["new_knowledge"], found["same"]) == (HOLDS, HOLDS, False)
    found = judged(numbers(0.9, 0.92, None), 64, 16)
    assert (found["compatible"]["verdict"], found["new_knowledge"]) == (DOUBT, UNKNOWN)  # the worse of the two
    assert found["compatible"] == {"verdict": DOUBT, **dict(zip(COMPATIBLE, (HOLDS, DOUBT), strict=True))}
    assert judged(numbers(0.4, 0.99, -0.3), 64, 16)["compatible"]["verdict"] == FAILS
    small = judged(numbers(0.4, 0.99, -0.3), 64, 5)
    assert small["compatible"] == {"verdict": HOLDS, "overlap_mass_student": HOLDS}  # lists of 5 are not judged
    assert judged(numbers(0.71, 0.99, 0.1, error=0.02), 64, 16)["compatible"]["overlap_ratio"] == DOUBT


def test_ranking() -> None:
    """First the conditions; where they are level, accuracy gained × overlap."""
    of = {"near": (0.9, 0.99, 0.1), "far": (0.4, 0.99, 0.3), "best": (0.8, 0.99, 0.3), "worse": (0.9, 0.99, -0.1)}
    rows = [{"name": name} | numbers(*n) | judged(numbers(*n), 64, 16) for name, n in of.items()]
    assert ranked(rows) == ranked(rows[::-1]) == ["best", "near", "far", "worse"]


def test_scoring_that_does_not_repeat_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows in a batch of four, whose last only fills it up."""
    drawn: Any = make_drawn()
    values = {name: np.array([[1.0, np.nan], [2.0, 3.0], [4.0, 5.0]]) for name in ("logp", "logq")}
    network: Any = None
    pair: Any = SimpleNamespace(dtype="float32")

    def scored(packed: float, padded: float) -> dict[str, Any]:
        def again(*_: Any, separate: bool = False, **__: Any) -> dict[str, np.ndarray]:
            change = np.array([[0, 0], [0, 0], [0, padded if separate else packed], [9, 9]])
            return {name: np.concatenate([x, x[:1]]) + change for name, x in values.items()}

        monkeypatch.setattr(module, "token_values", again)
        return check_scoring(pair, network, network, drawn, values)

    assert scored(0, 0) == {"repeats": True, "packing": 0, "rounding": 2e-3}
    assert scored(1e-7, 0)["repeats"] is False
    assert scored(0, -0.5)["packing"] == 0.5


def make_drawn() -> Drawn:
    rollouts = tiny_runs.make_rollouts(4)
    panel = Panel(rollouts.prompts, (np.arange(4),), 1, ("", "", ""), (None, None, None))
    return Drawn(panel, rollouts, [], None, {})


def test_what_is_advised(result: dict[str, Any]) -> None:
    row = result["teachers"][0]

    def told(changes: dict[str, Any], **of_result: Any) -> str:
        return " ".join(
            verdicts.section(result | of_result | {"teachers": [row | changes], "ranking": [row["name"]]}).lead
        )

    good = {"compatible": {"verdict": HOLDS} | dict.fromkeys(COMPATIBLE, HOLDS), "new_knowledge": HOLDS, "fades": None}
    bad = {"compatible": {"verdict": FAILS} | dict.fromkeys(COMPATIBLE, FAILS), "new_knowledge": FAILS}
    assert "cold start" not in told(good)
    assert "knowledge: take" not in told(good)
    assert "cold start" in told(good | {"compatible": bad["compatible"]})
    assert "reinforcement learning" in told(good | {"new_knowledge": FAILS})
    assert "shorter horizon" in told(good | {"fades": {"from": 20, "drop": 0.1, "error": 0.01}})
    assert "gave two results" in told(good | {"scoring": row["scoring"] | {"repeats": False}})
    assert "more than rounding" in told(good | {"scoring": row["scoring"] | {"packing": 1.0}})
    assert "harder ones" in told(good | {"new_knowledge": FAILS}, of_student=result["of_student"] | {"accuracy": 0.95})
    assert "data.answer=COLUMN" in told(good | {"new_knowledge": UNKNOWN, "knowledge": None, "reward": None})
