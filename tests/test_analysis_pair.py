"""Values of every token of a pair's rollouts against NumPy in float64; means by depth; pairs that are refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from opd_jax.analysis.pair import (
    Drawn,
    Network,
    Pair,
    Sampling,
    Values,
    by_depth,
    check_pair,
    depth_edges,
    draw_rollouts,
    load_panel,
    token_mean,
    token_values,
)
from opd_jax.commands.analysis import _models_and_data
from opd_jax.config_files import parse_data
from opd_jax.errors import InputError
from opd_jax.evaluation.answers import AnswerPool
from opd_jax.models.decoder import forward, head, unembed

SOURCE, SETTINGS = f"task:{tiny_runs.TASK}", ("chat=false", "limit=5")
PROBLEMS, SAMPLES, LIMIT = 5, 2, 9
SAMPLING = Sampling(samples=SAMPLES, max_response=LIMIT)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def pair(models: Path) -> Pair:
    return check_pair(models / "student", [models / "teacher"], batch=8, dtype="float32")


@pytest.fixture(scope="module")
def networks(pair: Pair) -> tuple[Network, Network]:
    return pair.load(pair.student), pair.load(pair.teachers[0])


@pytest.fixture(scope="module")
def drawn(pair: Pair, networks: tuple[Network, Network]) -> Drawn:
    panel, overlong = load_panel(pair, parse_data(SOURCE, SETTINGS), SAMPLING)
    assert not overlong.dropped
    with AnswerPool(1) as pool:
        return draw_rollouts(pair, networks[0], panel, pool, SAMPLING, "student")


@pytest.fixture(scope="module")
def values(pair: Pair, networks: tuple[Network, Network], drawn: Drawn) -> Values:
    return token_values(pair, *networks, drawn)


def log_softmax(network: Network, drawn: Drawn, row: int) -> np.ndarray:
    """log-probabilities before each token of a response, [length, V], of one whole forward pass; float64."""
    prompts = drawn.panel.prompts
    P, n = int(prompts.lengths[row]), int(drawn.lengths[row])
    text = np.concatenate([prompts.tokens[row, -P:], drawn.rollouts.tokens[row, :n]])[None]
    ones = jnp.ones(text.shape, jnp.int32)
    hidden = forward(network.params, network.config, jnp.asarray(text), jnp.arange(text.shape[1])[None], ones)
    logits = np.asarray(unembed(hidden, head(network.params)), np.float64)[0, P - 1 : P - 1 + n, : tiny_runs.VOCAB]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def expected(logp: np.ndarray, logq: np.ndarray, token: int, k: int) -> dict[str, float]:
    p, q = np.exp(logp), np.exp(logq)
    S_p, S_q = (set(np.argsort(-x, kind="stable")[:k].tolist()) for x in (logp, logq))
    I = sorted(S_p & S_q)
    a, b = p[I] / p[I].sum(), q[I] / q[I].sum()
    H_p, H_q = -(p * logp).sum(), -(q * logq).sum()
    return {
        "logp": logp[token],
        "logq": logq[token],
        "reward": logq[token] - logp[token],
        "kl_k1": logp[token] - logq[token],
        "reverse_kl": (p * (logp - logq)).sum(),
        "forward_kl": (q * (logq - logp)).sum(),
        "student_entropy": H_p,
        "teacher_entropy": H_q,
        "entropy_gap": abs(H_q - H_p),
        "overlap_ratio": len(I) / k,
        "overlap_advantage": (a * (np.log(b) - np.log(a))).sum() / len(I) if I else np.nan,
        "overlap_mass_student": p[I].sum(),
        "overlap_mass_teacher": q[I].sum(),
    }


def test_every_token_against_numpy(pair: Pair, networks: tuple[Network, Network], drawn: Drawn, values: Values) -> None:
    assert pair.k == 5  # a quarter of the vocabulary
    rows = drawn.panel.rows
    assert rows == PROBLEMS * SAMPLES < len(drawn.rollouts.lengths)  # some fill up the last batch
    assert {v.shape for v in values.values()} == {(rows, LIMIT)}
    assert len(set(drawn.lengths.tolist())) > 1
    for row in range(rows):
        logp, logq = (log_softmax(network, drawn, row) for network in networks)
        n = drawn.lengths[row]
        for t in range(n):
            for name, value in expected(logp[t], logq[t], int(drawn.rollouts.tokens[row, t]), pair.k).items():
                assert values[name][row, t] == pytest.approx(value, rel=2e-4, abs=2e-5, nan_ok=True), (name, row, t)
        assert all(np.isnan(v[row, n:]).all() for v in values.values())
        np.testing.assert_allclose(values["logp"][row, :n], drawn.rollouts.logp[row, :n], rtol=1e-4, atol=1e-5)


def test_packing_and_batches_change_nothing(
    models: Path, pair: Pair, networks: tuple[Network, Network], drawn: Drawn, values: Values
) -> None:
    for name, padded in token_values(pair, *networks, drawn, separate=True).items():
        np.testing.assert_allclose(padded, values[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_student_that_is_its_teacher(pair: Pair, networks: tuple[Network, Network], drawn: Drawn) -> None:
    values = token_values(pair, networks[0], networks[0], drawn)
    for name in ("reward", "reverse_kl", "forward_kl", "entropy_gap", "overlap_advantage"):
        np.testing.assert_allclose(np.nan_to_num(values[name]), 0, atol=2e-6, err_msg=name)
    inside = np.isfinite(values["logp"])
    assert (values["overlap_ratio"][inside] == 1).all()


def test_grading(drawn: Drawn) -> None:
    assert drawn.correct.shape == (PROBLEMS, SAMPLES)
    assert drawn.summary["accuracy"] == drawn.correct.mean()
    assert len(drawn.texts) == drawn.panel.rows


def test_means_by_depth() -> None:
    """Rows of one prompt are a cluster: two equal rows tell no more than one."""
    values = np.array([[1.0, 3.0, np.nan, np.nan], [2.0, 5.0, 9.0, np.nan], [0.0, np.nan, np.nan, np.nan]])
    mean, error = token_mean(values, 3)
    assert mean == pytest.approx(20 / 6)
    twice = np.repeat(values, 2, axis=0)
    assert token_mean(twice, 3) == pytest.approx((mean, error))
    assert token_mean(twice, 6)[1] < 0.8 * error
    rows = by_depth(values, np.array([0, 1, 4]), 3)
    assert [(r["start"], r["end"], r["tokens"], r["mean"]) for r in rows] == [(0, 1, 3, 1), (1, 4, 3, 17 / 3)]
    assert np.isnan(by_depth(values, np.array([3, 4]), 3)[0]["mean"])


def test_depth_edges() -> None:
    assert depth_edges(80).tolist() == list(range(0, 81, 10))
    assert depth_edges(3).tolist() == [0, 1, 2, 3]
    edges = depth_edges(7168)
    assert (edges[0], edges[-1], len(edges)) == (0, 7168, 9)


def refused(models: Path, teacher: str, max_response: int = 9) -> str:
    def prepare() -> None:
        pair = check_pair(models / "student", [models / teacher], dtype="float32")
        load_panel(pair, parse_data(SOURCE, SETTINGS), Sampling(2, 1, max_response))

    with pytest.raises(InputError) as caught:
        prepare()
    return str(caught.value)


def test_refused(models: Path, tmp_path: Path) -> None:
    swapped = tmp_path / "swapped"
    shutil.copytree(models / "teacher", swapped)
    file = swapped / "tokenizer.json"
    tree = json.loads(file.read_text())
    vocabulary = tree["model"]["vocab"]
    vocabulary["3"], vocabulary["4"] = vocabulary["4"], vocabulary["3"]
    file.write_text(json.dumps(tree))
    assert "swapped: student and teacher have different tokenizers: 21 / 21 tokens, 2 ids differ" in refused(
        models, str(swapped)
    )
    assert "made for. Give --max-response 58 or less" in refused(models, "teacher", max_response=59)
    assert "no such directory" in refused(models, "absent")
    with pytest.raises(InputError, match="stands twice"):
        check_pair(models / "student", [models / "teacher"] * 2)


def test_prompts_without_answers(models: Path, pair: Pair, tmp_path: Path) -> None:
    file = tmp_path / "open.jsonl"
    file.write_text(json.dumps({"problem": "1 * 2 mod 5 ?"}) + "\n")
    data, sampling = parse_data(str(file), ("chat=false",)), Sampling(max_response=5)
    with pytest.raises(InputError, match="no answer"):
        load_panel(pair, data, sampling)
    panel, _ = load_panel(pair, data, sampling, graded=False)
    assert panel.answers == (None,)


def test_arguments_of_the_commands(tmp_path: Path) -> None:
    """A path with a sign of equality is no setting where it exists."""
    student, *teachers, data = _models_and_data(["s", "chat=false", "t", "u", "task:products-5x2", "data.limit=3"])
    assert (student, teachers) == (Path("s"), [Path("t"), Path("u")])
    assert (data.source, data.chat, data.limit) == ("task:products-5x2", False, 3)
    odd = tmp_path / "lr=1"
    odd.mkdir()
    assert _models_and_data(["s", str(odd), "x.jsonl"])[1] == odd
    for given in (["s", "x.jsonl"], ["x.jsonl", "limit=3"], ["limit=3"]):
        with pytest.raises(InputError, match="expected STUDENT, at least one TEACHER"):
            _models_and_data(given)


def test_names_of_teachers(pair: Pair) -> None:
    assert pair.names() == ["teacher"]
    two = dataclasses.replace(pair, teachers=(Path("a/best"), Path("b/best")))
    assert two.names() == ["a/best", "b/best"]
