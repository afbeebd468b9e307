"""Coherence of constructed gradients; token gradients against each token's loss differentiated by itself; projections
against exact ones; what is said of a student that is its own teacher."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from opd_jax.analysis import agreement
from opd_jax.analysis import gradients as analysis
from opd_jax.analysis import token_gradients as module
from opd_jax.analysis.agreement import section
from opd_jax.analysis.coherence import bilinear, coherence, cosines
from opd_jax.analysis.estimates import estimate, prompt_weights
from opd_jax.analysis.gradients import analyse_gradients
from opd_jax.analysis.pair import Sampling
from opd_jax.analysis.token_gradients import (
    CLASSES,
    VARIANTS,
    Both,
    check_exact,
    choose_states,
    inner_products,
    token_gradients,
)
from opd_jax.config import Objective
from opd_jax.config_files import parse_data
from opd_jax.errors import InputError
from opd_jax.losses.reference import reference_loss
from opd_jax.models.decoder import DecoderConfig, forward, head, init_params
from opd_jax.models.hf import load_model


def shape(vocab: int, tied: bool = True, **sizes: Any) -> DecoderConfig:
    given: dict[str, Any] = {"width": 16, "hidden": 24, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 8} | sizes
    return DecoderConfig("llama", vocab, **given, norm_eps=1e-6, rope_theta=1e4, max_positions=64, tie_embeddings=tied)


def tiny(vocab: int, seed: int, tied: bool = True, **sizes: Any) -> tuple[DecoderConfig, Any]:
    network = shape(vocab, tied, **sizes)
    return network, jax.tree.map(lambda w: 2 * w, init_params(network, jax.random.key(seed)))


def rollouts_of(vocab: int, rows: int = 6) -> Any:
    made: Any = tiny_runs.make_rollouts(rows, prompt=4, response=5, k=2)
    prompts = dataclasses.replace(made.prompts, tokens=made.prompts.tokens % vocab)
    return dataclasses.replace(made, tokens=made.tokens % vocab, prompts=prompts)


def test_constructed_gradients() -> None:
    """Aligned 1, orthogonal 1/√n, opposed 0."""
    problem, mask = np.arange(8) // 2, np.ones(8, bool)
    weights = prompt_weights(4)
    e = np.eye(8)
    aligned = np.outer(np.arange(1.0, 9), e[0])
    opposed = np.repeat(e[:4], 2, axis=0) * np.tile([1.0, -1.0], 4)[:, None]
    for g, value, ratio in ((aligned, 1, None), (3 * e, 8**-0.5, 1), (opposed, 0, 0)):
        found = coherence(g @ g.T, problem, mask, weights)
        assert found is not None
        assert found.value.value == pytest.approx(value, abs=1e-12)
        assert found.orthogonal.value == pytest.approx(np.sqrt((g**2).sum()) / np.linalg.norm(g, axis=1).sum())
        if ratio is not None:
            assert found.ratio.value == pytest.approx(ratio, abs=1e-12)
    assert coherence(np.zeros((8, 8)), problem, mask, weights) is None
    part = coherence(opposed @ opposed.T, problem, np.arange(8) % 2 == 0, weights)
    assert part is not None
    assert part.value.value == pytest.approx(4**-0.5)  # one of each pair: four orthogonal ones


def test_resampled_problems_are_not_paired_with_their_copies() -> None:
    """The mean of the draws is the value, and the interval holds the truth in about 95 % of made-up sets."""
    weights = prompt_weights(24)
    rng = np.random.default_rng(0)
    g = rng.normal(size=(24, 40))
    found = bilinear(g @ g.T, weights)
    assert found.draws.mean() == pytest.approx(found.value, rel=0.03)
    naive = np.einsum("ri,ij,rj->r", weights, g @ g.T, weights)
    assert naive.mean() > 1.8 * found.value
    shared, held = np.zeros(40), []
    shared[0] = 3.0
    true = 3.0**2 * 24**2 + 24 * 40  # E‖Σ g‖²
    for _ in range(200):
        g = shared + rng.normal(size=(24, 40))
        interval = estimate(*bilinear(g @ g.T, weights[:500]), 24)
        held.append(interval.low < true < interval.high)
    assert np.mean(held) > 0.9


def test_cosines() -> None:
    g = np.array([[1.0, 0], [1, 0], [0, 2], [0, -3], [0, 0]])
    problem = np.array([0, 0, 0, 1, 1])
    same = problem[:, None] == problem
    found = cosines(g @ g.T, {"same": same, "other": ~same}, problem, prompt_weights(2))["groups"]
    assert (found["same"]["pairs"], found["same"]["mean"]["value"]) == (3, pytest.approx(1 / 3))
    assert (found["other"]["pairs"], found["other"]["mean"]["value"]) == (3, pytest.approx(-1 / 3))
    assert sum(found["other"]["histogram"]) == 3


@pytest.mark.parametrize("tokens", [3, 40, 100, 1000])
def test_tokens_are_spread_over_all_rollouts(tokens: int) -> None:
    """As many as are asked for, also when they are fewer than rollouts; each once, in order."""
    lengths = np.full(100, 7)
    found = choose_states(lengths, tokens, 4)
    index = 7 * found.sequence + found.position
    assert len(index) == min(tokens, 700)
    assert (np.diff(index) > 0).all()
    assert (found.problem == found.sequence // 4).all()
    assert (np.histogram(found.sequence, 3, (0, 100))[0] >= int(0.32 * len(index))).all()
    if tokens == 100:
        assert len(np.unique(found.position)) == 7


def test_inner_products_of_nearly_equal_sums() -> None:
    """A distance of 1e-6 of the norm, which float32 sums do not resolve."""
    a, b = np.random.default_rng(0).normal(size=(2, 5000)).astype(np.float32)
    rows = np.stack([a, a + np.float32(1e-6) * b])
    gram = inner_products(rows)
    exact = np.linalg.norm(rows[1].astype(np.float64) - rows[0])
    assert np.sqrt(gram[0, 0] + gram[1, 1] - 2 * gram[0, 1]) == pytest.approx(exact, rel=1e-3)


def test_exact_gradients_of_a_large_model_are_refused() -> None:
    check_exact(shape(12), 512, 64)
    with pytest.raises(InputError, match=r"--directions 1024"):
        check_exact(shape(150_000, width=1024), 512, 64)


def test_drawn_tokens_and_directions_do_not_share_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[Any] = []

    def at_states(both: Any, *given: Any) -> Any:
        keys.append(given[-1])
        states = len(given[-2][0])
        return jnp.ones((both.rows, states, 12)), jnp.ones((states, 16)), jnp.zeros(states, int)

    def projected(*given: Any) -> Any:
        keys.extend(jax.random.fold_in(given[-2], number) for number in given[-1])
        return jnp.ones((*given[4].shape[:2], len(given[-1])))

    monkeypatch.setattr(module, "_logit_gradients", at_states)
    monkeypatch.setattr(module, "_projected", projected)
    c, p, rollouts = shape(12), {"embed": np.ones((12, 16))}, rollouts_of(11, 2)
    states = choose_states(np.asarray(rollouts.lengths), 4, 1)
    token_gradients(Both(c, c, 12, 3, (("full", Objective()),)), p, p, rollouts, states, directions=2)
    data = {tuple(np.asarray(jax.random.key_data(k)).tolist()) for k in keys}
    assert len(keys) == 4  # a batch is looked at twice, and has two directions
    assert len(data) == 3


class Tiny:
    """A student and a teacher of 11 ids, with rollouts, in float64; one token's loss differentiated at a time."""

    def __init__(self, tied: bool = True) -> None:
        (self.c, p), (self.d, q) = tiny(12, 0, tied), tiny(11, 1, True, width=8, layers=1)
        self.p, self.q = (jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), x) for x in (p, q))
        self.rollouts = rollouts_of(11, 4)
        self.lengths = np.asarray(self.rollouts.lengths)
        self.states = choose_states(self.lengths, 100, 2)
        self._gradients = jax.jit(jax.grad(self._loss), static_argnums=4)
        self._logits = jax.jit(self._forward, static_argnums=2)

    def _loss(self, p: Any, text: Any, at: Any, target: Any, objective: Objective) -> Any:
        columns = jnp.arange(text.shape[1])[None]
        inputs = text, columns, (columns <= at).astype(jnp.int32)
        hidden = [forward(w, k, *inputs, dtype=jnp.float64) for w, k in ((p, self.c), (self.q, self.d))]
        sides = hidden[0], head(p), hidden[1], head(self.q)
        return reference_loss(*sides, jnp.full_like(text, target), columns == at, objective, vocab_size=11)[0]

    def _forward(self, params: Any, text: Any, c: DecoderConfig) -> Any:
        columns = jnp.arange(text.shape[1])[None]
        hidden = forward(params, c, text, columns, jnp.ones_like(columns), dtype=jnp.float64)
        return hidden[0] @ head(params)[:11].T

    def logits(self, params: Any, text: np.ndarray, c: DecoderConfig) -> np.ndarray:
        return np.asarray(self._logits(params, text, c))

    def text(self, state: int) -> tuple[np.ndarray, int]:
        """What stands before the token of a state, and the column that predicts it."""
        s, t = self.states.sequence[state], self.states.position[state]
        n = int(self.rollouts.prompts.lengths[s])
        text = np.zeros((1, 9), np.int32)
        text[0, : n + t] = [*self.rollouts.prompts.tokens[s, 4 - n :], *self.rollouts.tokens[s, :t]]
        return text, n + t - 1

    def gradient(self, state: int, objective: Objective, target: int = 0) -> np.ndarray:
        text, at = self.text(state)
        tree = self._gradients(self.p, text, at, target, objective)
        return np.concatenate([np.ravel(g) for g in jax.tree.leaves(tree)])

    def both(self, *names: str) -> Both:
        return Both(self.c, self.d, 11, 3, tuple((n, VARIANTS[n]) for n in names))


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_token_gradients_by_brute_force(tied: bool) -> None:
    with jax.enable_x64(True):
        case = Tiny(tied)
        assert len(case.states.sequence) == case.lengths.sum()
        names = ("full", "topk k=1", "topk k=4", "topk_reference k=1")
        exact = token_gradients(
            case.both(*names), case.p, case.q, case.rollouts, case.states, directions=0, title="exact"
        )
        assert exact.directions is None
        n = len(case.states.sequence)
        g = {name: np.array([case.gradient(j, VARIANTS[name]) for j in range(n)]) for name in names[::2]}
        np.testing.assert_allclose(exact.token, g["full"] @ g["full"].T, rtol=1e-4, atol=1e-5)
        sums = [[x[case.states.sequence == s].sum(0) for s in range(case.states.sequences)] for x in g.values()]
        of = np.einsum("asp,btp->asbt", sums, sums)
        np.testing.assert_allclose(exact.sums[::2, :, ::2], of, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(exact.squares[2], (g["topk k=4"] ** 2).sum(1), rtol=1e-4, atol=1e-9)
        apart = ((g["topk k=4"] - g["full"]) ** 2).sum(1)
        np.testing.assert_allclose(exact.distances[2], apart, rtol=1e-4, atol=1e-9)
        assert exact.squares[1].max() < 1e-20 * exact.squares[0].max()  # top-1 of Eq. 5
        logits = [z_of(case, j) for j in range(4)]
        tokens = [case.rollouts.tokens[s, t] for s, t in zip(case.states.sequence, case.states.position, strict=True)]
        for (z, t), y, found in zip(logits, tokens, exact.classes, strict=False):
            in_p, in_q = (int(y) in np.argsort(-x)[:3] for x in (z, t))
            assert found == (0 if in_p and in_q else 1 if in_p else 2)


@pytest.mark.exhaustive
@pytest.mark.parametrize("tied", [True, False])
def test_projections_against_exact_gradients(tied: bool) -> None:
    with jax.enable_x64(True):
        case = Tiny(tied)
        names = ("full", "topk k=1", "topk k=4", "topk_reference k=1")
        exact, rough = (
            token_gradients(case.both(*names), case.p, case.q, case.rollouts, case.states, directions=m)
            for m in (0, 1024)
        )
        assert rough.directions == 1024
        np.testing.assert_allclose(rough.squares[[0, 2, 3]], exact.squares[[0, 2, 3]], rtol=0.22)
        scale = np.sqrt(np.outer(np.diag(exact.token), np.diag(exact.token)))
        assert np.abs((rough.token - exact.token) / scale).max() < 0.16  # 5 standard errors
        own = np.abs(rough.sums - exact.sums)[:1, :, :1]
        assert own.max() < 0.16 * np.einsum("asas->as", exact.sums)[0].max()


def z_of(case: Tiny, state: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits of student and teacher."""
    text, at = case.text(state)
    return case.logits(case.p, text, case.c)[at], case.logits(case.q, text, case.d)[at]


def test_sampled_is_unbiased_by_enumeration() -> None:
    """Σ_y p(y) of its gradient in the parameters is that of the full KL; its measured noise is that of all y."""
    with jax.enable_x64(True):
        case = Tiny()
        both = case.both("full", "sampled")
        states = case.states._replace(**{name: x[:2] for name, x in case.states._asdict().items()})
        for j in range(2):
            p = np.asarray(jax.nn.softmax(z_of(case, j)[0]))
            g = np.array([case.gradient(j, VARIANTS["sampled"], y) for y in range(11)])
            np.testing.assert_allclose(p @ g, case.gradient(j, Objective()), atol=1e-9)
            variance = p @ ((g - p @ g) ** 2).sum(1)
            draws = [
                token_gradients(both, case.p, case.q, case.rollouts, states, seed=i, directions=0).distances[1, j]
                for i in range(40)
            ]
            assert abs(np.mean(draws) - variance) < 4 * np.std(draws) / np.sqrt(40)


@pytest.mark.long
def test_projections_of_a_model_of_a_million_weights() -> None:
    c, p = tiny(64, 0, width=128, hidden=512, layers=4, heads=4, kv_heads=4, head_dim=32)
    d, q = tiny(64, 1, width=32, layers=1)
    assert 0.9e6 < sum(x.size for x in jax.tree.leaves(p)) < 1.3e6
    rollouts = rollouts_of(60, 4)
    states = choose_states(np.asarray(rollouts.lengths), 24, 2)
    both = Both(c, d, 60, 4, (("full", VARIANTS["full"]), ("topk k=4", VARIANTS["topk k=4"])))
    exact, rough = (token_gradients(both, p, q, rollouts, states, directions=n, title="") for n in (None, 1024))
    assert (exact.directions, rough.directions) == (None, 1024)
    weights, mask = prompt_weights(2), np.ones(len(states.sequence), bool)
    found = [coherence(x.token, states.problem, mask, weights) for x in (exact, rough)]
    assert found[0]
    assert found[1]
    for name in ("value", "orthogonal", "ratio"):
        a, b = (getattr(x, name).value for x in found)
        print(name, b / a - 1)
        assert b == pytest.approx(a, rel=0.05)
    norms = [np.sqrt(x.squares) for x in (exact, rough)]
    print("norms", np.abs(norms[1] / norms[0] - 1).max(), np.abs(norms[1] / norms[0] - 1).std())
    assert norms[1].mean() == pytest.approx(norms[0].mean(), rel=0.05)
    assert np.abs(norms[1] / norms[0] - 1).max() < 5 / np.sqrt(2 * 1024)


SOURCE = parse_data(f"task:{tiny_runs.TASK}", ("chat=false", "limit=8"))


@pytest.fixture(scope="module", params=[4, pytest.param(len(VARIANTS), marks=pytest.mark.exhaustive)])
def analysed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any], Any]:
    """With the first objectives (in the default run) or all: models, weights that were differentiated, result."""
    models, seen = tiny_runs.write_models(tmp_path_factory.mktemp("models")), []

    def measure(both: Both, *given: Any, **settings: Any) -> Any:
        seen.append(given[:2])
        return token_gradients(both, *given, **settings)

    student, teacher = models / "student", models / "teacher"
    settings: dict[str, Any] = {"tokens": 24, "directions": 64, "batch": 16, "dtype": "bfloat16"}
    sampling = Sampling(8, 2, 8, fallback_number=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis, "VARIANTS", dict(list(VARIANTS.items())[: request.param]))
        patch.setattr(analysis, "measure", measure)
        return models, seen, analyse_gradients(student, [teacher, student], SOURCE, sampling, **settings)


@pytest.fixture
def result(analysed: tuple[Path, list[Any], Any]) -> dict[str, Any]:
    return analysed[2]


def test_gradients_are_of_the_weights_as_they_are_stored(analysed: tuple[Path, list[Any], Any]) -> None:
    """Rollouts come from weights rounded to --dtype, gradients do not."""
    models, seen, _ = analysed
    for name, found in zip(("student", "teacher"), seen[0], strict=True):
        jax.tree.map(np.testing.assert_array_equal, found, load_model(models / name)[0])


def test_analysis(result: dict[str, Any]) -> None:
    assert result == json.loads(json.dumps(result, allow_nan=False))
    t = result["teachers"][0]
    assert t["defined"]
    assert sum(t["norms"][name]["tokens"] for name in CLASSES if name in t["norms"]) == result["tokens"]
    assert sum(row["tokens"] for row in t["by_depth"]) == result["tokens"]
    whole = t["coherence"]["all"]
    assert 0 < whole["coherence"]["value"] < 1
    assert whole["ratio"]["value"] == pytest.approx(whole["coherence"]["value"] / whole["orthogonal"]["value"])
    variants = {row["name"]: row for row in t["variants"]}
    assert variants["full"]["bias"]["batch"]["value"] == pytest.approx(0, abs=1e-6)
    assert variants["full"]["coherence"]["value"] == pytest.approx(whole["coherence"]["value"], rel=1e-4)
    top1 = variants["topk k=1"]
    assert (top1["bias"]["batch"]["value"], top1["cosine"], top1["coherence"]) == (pytest.approx(1), None, None)
    assert variants["sampled"]["bias"] is None
    assert variants["sampled"]["noise"]["batch"]["value"] > 0
    shown = section(result)
    assert shown.name == "gradients"
    for table in shown.tables:
        assert {len(row) for row in table.rows} == {len(table.columns)}
    assert [len(plot.draw().axes) for plot in shown.plots] == [1] * 6


def test_student_that_is_its_teacher_has_no_coherence(result: dict[str, Any]) -> None:
    assert not result["teachers"][1]["defined"]
    shown = section(result)
    assert any("student: it says the same as the student" in x and "Coherence is undefined." in x for x in shown.lead)
    assert not any(table.title.startswith("student:") for table in shown.tables)
    assert not any("less coherent" in x or "undecided" in x for x in shown.lead)


def test_teachers_are_compared_in_words(result: dict[str, Any]) -> None:
    first = result["teachers"][0]

    def told(value: float, half: float) -> str:
        held = {"value": value, "error": half / 2, "low": value - half, "high": value + half}
        other = first | {"name": "other", "difference": {"coherence": held, "ratio": held}}
        return " ".join(section(result | {"teachers": [first, other]}).lead)

    assert "its gradients are less coherent than those of teacher" in told(-0.2, 0.1)
    assert "its gradients are more coherent than those of teacher" in told(0.2, 0.1)
    assert "undecided whether" in told(0.1, 0.2)


def test_an_interval_that_holds_1_shows_no_equality() -> None:
    assert "not told apart from random directions" in agreement.meaning({"value": 1.0, "low": 0.5, "high": 2.0})
    assert "cancel in part" in agreement.meaning({"value": 0.5, "low": 0.4, "high": 0.7})
    assert "agree more than at random" in agreement.meaning({"value": 1.5, "low": 1.1, "high": 2.0})
