"""Several, prompted, moving, extrapolated teachers, off-policy texts, rewards in a step: against brute force."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_hosts
import tiny_runs
from test_training_mesh import setup_on
from test_training_resume import final_state
from test_training_resume import rows as log_rows
from test_training_step import toy_loss, toy_tree
from tiny_runs import STUDENT, TEACHER, VOCAB, by_response, distance

from opd_jax.config import Config, Optimizer
from opd_jax.data.templates import encode_prompt
from opd_jax.errors import InputError, Interrupted
from opd_jax.mesh import Layout, make_mesh
from opd_jax.models.decoder import DecoderConfig, forward, head
from opd_jax.models.hf import save_model
from opd_jax.objectives.opd import opd_loss
from opd_jax.sampling.packing import join_texts, over_passes, pack, pack_beside, split
from opd_jax.tracking.writers import MetricWriter
from opd_jax.training import loop
from opd_jax.training.graphs import rows_per_pass
from opd_jax.training.loop import train
from opd_jax.training.optimizer import make_optimizer
from opd_jax.training.scoring import Teaching
from opd_jax.training.setup import Setup
from opd_jax.training.stages import rewarded, rollout_step
from opd_jax.training.state import TrainState
from opd_jax.training.step import global_gradient, make_update
from opd_jax.types import Params, Rollouts, Scores

ROWS, RESPONSE, WIDTH = 8, 10, 34  # columns that hold any context and response
CONTEXT = "{problem} Answer: {answer} so {problem}"
MIX = {
    "mix": {"one": {"source": f"task:{tiny_runs.TASK}"}, "two": {"source": f"task:{tiny_runs.TASK}", "split": "test"}},
    "chat": False, "max_prompt": 8, "limit": 9,
}  # fmt: skip
TEXTS = {"source": f"task:{tiny_runs.TASK}", "chat": False, "max_prompt": 8, "limit": 32, "response": "response"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``student``, ``teacher``, ``second`` (of the teacher's shape) and ``past`` (of the student's)."""
    root = tiny_runs.write_models(tmp_path_factory.mktemp("models"))
    for name, network, seed in (("second", TEACHER, 2), ("past", STUDENT, 3)):
        save_model(root / name, tiny_runs.params_of(network, seed), network, tokenizer_from=root / "tokenizer")
    return root


def sampled(setup: Setup, seed: int = 0) -> Rollouts:
    """Random ragged responses to the next prompts."""
    base = tiny_runs.make_rollouts(response=RESPONSE)
    rng = np.random.default_rng(seed)
    logp = rng.normal(-3, 0.5, base.logp.shape).astype(np.float32)
    return dataclasses.replace(base, prompts=next(setup.batches), logp=logp)  # pyright: ignore


# --- brute force: one sequence a row, dense logits ---


@functools.partial(jax.jit, static_argnums=0)
def dense_states(network: DecoderConfig, params: Params, tokens_BW: Any, starts_B: Any) -> Any:
    """[B, R, D] states that predict the responses, which begin at ``starts_B``; what is right of them is not seen."""
    positions = jnp.broadcast_to(jnp.arange(WIDTH), tokens_BW.shape)
    hidden = forward(params, network, tokens_BW, positions, jnp.ones_like(tokens_BW))
    columns = jnp.minimum(starts_B[:, None] - 1 + jnp.arange(RESPONSE), WIDTH - 1)
    return jnp.take_along_axis(hidden, columns[..., None], axis=1)


def dense_logits(network: DecoderConfig, params: Params, text: Any) -> Any:
    return dense_states(network, params, *text) @ head(params)[:VOCAB].T


def behind(prompts: Any, rollouts: Rollouts) -> tuple[Any, Any]:
    """(tokens, starts) of the responses behind those prompts."""
    tokens = np.zeros((len(prompts), WIDTH), np.int32)
    for i, prompt in enumerate(prompts):
        whole = [*prompt, *np.asarray(rollouts.tokens)[i, : int(rollouts.lengths[i])]]
        tokens[i, : len(whole)] = whole
    return tokens, np.array([len(p) for p in prompts])


def own_prompts(rollouts: Rollouts) -> list[list[int]]:
    lengths = np.asarray(rollouts.prompts.lengths)
    return [np.asarray(rollouts.prompts.tokens)[i, -n:].tolist() for i, n in enumerate(lengths)]


@functools.partial(jax.jit, static_argnames="k")
@functools.partial(jax.value_and_grad)
def dense_loss(params: Params, text: Any, target_BRV: Any, weight_BR: Any, k: int = 0) -> Any:
    """Reverse KL to softmax(target), over the k ids most probable to the student (0: all), averaged by weight."""
    s, t = dense_logits(STUDENT, params, text), target_BRV
    if k:
        least = jax.lax.stop_gradient(jax.lax.top_k(s, k)[0][..., -1:])
        s, t = (jnp.where(jax.lax.stop_gradient(s) >= least, z, -1e9) for z in (s, t))
    p, q = jax.nn.log_softmax(s), jax.nn.log_softmax(t)
    kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    return jnp.sum(jnp.where(weight_BR > 0, kl * weight_BR, 0.0)) / jnp.sum(weight_BR)


# --- targets ---

CASES: dict[str, dict[str, Any]] = {
    "two teachers": {"data": MIX, "second": {"sources": ["two"], "weight": 3.0}},
    "context": {"data": MIX, "teacher": {"context": CONTEXT, "max_context": 30}},
    "extrapolated": {"data": MIX, "objective": {"name": "full", "k": 4, "scale": 1.3}},
    "moving": {"data": MIX, "teacher": {"path": "past", "decay": 0.5}},
    "all": {
        "data": MIX,
        "teacher": {"path": "past", "decay": 0.5, "context": CONTEXT, "max_context": 30, "weight": 0.5},
        "second": {"sources": ["two"], "context": "then {problem}"},
        "objective": {"name": "full", "k": 4, "scale": 1.3},
    },
}


def targets_setup(models: Path, case: str, sizes: tuple[int, int, int], pack: bool) -> Setup:
    settings = dict(CASES[case])
    own, second = settings.pop("teacher", {}), settings.pop("second", None)
    settings["teacher"] = own | {"path": str(models / own.get("path", "teacher"))}
    settings["more_teachers"] = [second | {"path": str(models / "second")}] if second else []
    return setup_on(models, sizes, pack=pack, **settings)


@pytest.mark.parametrize(
    ("case", "sizes", "pack"),
    [
        ("all", (1, 1, 1), True),
        *(
            pytest.param(case, sizes, pack, marks=pytest.mark.long)
            for case in CASES
            for sizes, pack in (((1, 1, 1), True), ((1, 1, 1), False), ((2, 2, 2), True))
            if (case, sizes, pack) != ("all", (1, 1, 1), True)
        ),
    ],
    ids=str,
)
def test_targets(models: Path, case: str, sizes: tuple[int, int, int], pack: bool) -> None:
    """States at the responses, loss and gradient, of rows that hold sequences of both sources."""
    setup = targets_setup(models, case, sizes, pack)
    config, teaching = setup.config, setup.teaching
    assert teaching
    rollouts = sampled(setup)
    sources = [setup.records[i].source for i in np.asarray(rollouts.prompts.ids)]
    assert set(sources) == {"one", "two"}
    moving = tiny_runs.params_of(STUDENT, 3) if setup.state.moving else {}
    moved = jax.tree.map(lambda w: 1.1 * w, moving)  # not what stands in the files

    packed, beside, columns = teaching.pack(rollouts)
    packed = teaching.weigh(rollouts, packed)
    rows = setup.layout.put_rows(packed)
    scores = teaching.scores(moved, rollouts, rows, beside, columns)

    @jax.jit
    def gradient(params: Any, rows: Any, hidden: Any, frozen: Any) -> Any:
        return global_gradient(
            lambda params, rows, hidden, frozen: opd_loss(
                params, rows, Scores(hidden, frozen), config=STUDENT, objective=config.objective,
                vocab_size=VOCAB, layout=setup.layout, metrics=False,
            ),
            params, rows, hidden, frozen=frozen, layout=setup.layout,
            micro_batch=rows_per_pass(config, math.prod(sizes[:2])),
        )  # fmt: skip

    grads, loss, _ = jax.device_get(gradient(setup.state.params, rows, scores.hidden, scores.head))

    taught = [0 if s == "one" or not config.more_teachers else 1 for s in sources]
    sections = [t for t in (config.teacher, *config.more_teachers) if t]
    networks = [
        (STUDENT if moving else TEACHER, moved or tiny_runs.params_of(TEACHER, 1)),
        (TEACHER, tiny_runs.params_of(TEACHER, 2)),
    ][: len(sections)]
    prompts = []
    for i, own, t in zip(np.asarray(rollouts.prompts.ids), own_prompts(rollouts), taught, strict=True):
        record, context = setup.records[i], sections[t].context
        told = (context or "").replace("{problem}", record.problem).replace("{answer}", str(record.answer))
        prompts.append(encode_prompt(setup.tokenizer, told, "plain", False, {}) if context else own)
    text, scale, mine = behind(prompts, rollouts), config.objective.scale, np.array(taught)
    states = [dense_states(n, p, *text) for n, p in networks]
    logits = [s @ head(p)[:VOCAB].T for s, (_, p) in zip(states, networks, strict=True)]
    target = scale * sum(np.where((mine == i)[:, None, None], z, 0) for i, z in enumerate(logits))
    start = tiny_runs.params_of(STUDENT, 0)
    if scale != 1:
        target += (1 - scale) * dense_logits(STUDENT, start, text)
    weight = tiny_runs.response_mask(rollouts) * np.array([sections[t].weight for t in taught])[:, None]
    want, want_grads = dense_loss(start, behind(own_prompts(rollouts), rollouts), target, weight)

    found = by_response(packed, jax.device_get(scores.hidden))
    parts = [scale * np.where((mine == i)[:, None, None], s, 0) for i, s in enumerate(states)]
    if scale != 1:
        parts.append((1 - scale) * np.asarray(dense_states(STUDENT, start, *text)))
    mask = tiny_runs.response_mask(rollouts)
    np.testing.assert_allclose(found[mask], np.concatenate(parts, -1)[mask], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert distance(grads, want_grads) < 1e-5
    if pack:
        assert np.any(np.array([len(set(row[row > 0])) for row in packed.segments]) > 1)


def test_responses_beside_other_prompts() -> None:
    """Longer, shorter and equal prompts: each response token's column in one pair of rows and in the other."""
    rollouts = tiny_runs.make_rollouts()
    contexts = [[7] * (1 + 5 * (i % 3)) for i in range(ROWS)]
    rows, beside, columns = pack_beside(rollouts, contexts, 11, multiple=2)
    alone = pack(rollouts)
    for name in ("targets", "logp", "depth", "topk_ids"):
        np.testing.assert_array_equal(by_response(rows, getattr(rows, name)), by_response(alone, getattr(alone, name)))
    moved = np.take_along_axis(np.asarray(beside.targets), columns, axis=1)
    np.testing.assert_array_equal(by_response(rows, moved), by_response(alone, alone.targets))
    for name in ("segments", "depth"):
        moved = np.take_along_axis(np.asarray(getattr(beside, name)), columns, axis=1)
        np.testing.assert_array_equal(moved[rows.mask], np.asarray(getattr(rows, name))[rows.mask])
    used = [np.sum(beside.segments == i + 1) for i in range(ROWS)]
    np.testing.assert_array_equal(used, [len(c) + n - 1 for c, n in zip(contexts, rollouts.lengths, strict=True)])
    with pytest.raises(InputError, match="sequences to pack"):
        pack_beside(rollouts, [[1] * 14] * ROWS, 12)
    with pytest.raises(InputError, match="sequences to pack"):
        pack_beside(rollouts, [[]] * ROWS, 12)


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)], ids=str)
def test_passes_that_hold_nothing_do_not_run(sizes: tuple[int, int, int] | None) -> None:
    """Empty rows at the beginning, in the middle and at the end; all empty; none."""
    layout = Layout(make_mesh(*sizes)) if sizes else None
    shards, size = (4, 4) if sizes else (1, 2)
    rows = pack(tiny_runs.make_rollouts(16), separate=True, layout=layout)
    rng = np.random.default_rng(0)
    for keep in (np.ones(16, bool), np.zeros(16, bool), *(rng.random((4, 16)) < 0.4), np.arange(16) == 6):
        some: Any = dataclasses.replace(rows, segments=np.asarray(rows.segments) * keep[:, None])
        given = layout.put_rows(some) if layout else some

        @jax.jit
        def run(rows: Any, more: Any, layout: Any = layout) -> Any:
            def body(carry: Any, i: Any, part: Any, more: Any) -> Any:
                passes, total, other = carry
                return passes.at[i].add(1), total + jnp.sum(part.targets * (part.segments > 0)), other + jnp.sum(more)

            start = jnp.zeros(16 // size, jnp.int32), jnp.int32(0), jnp.float32(0)
            return over_passes(body, start, rows, more, micro_batch=size, layout=layout)

        numbers = np.arange(16, dtype=np.float32)
        passes, total, other = run(given, layout.put_rows(numbers) if layout else numbers)
        used = keep.reshape(shards, 16 // size, size // shards).any((0, 2))
        np.testing.assert_array_equal(passes, used)
        assert total == np.sum(np.asarray(rows.targets) * (np.asarray(rows.segments) > 0) * keep[:, None])
        assert other == numbers.reshape(shards, 16 // size, -1)[:, used].sum()


# --- moving teachers ---


@pytest.mark.parametrize(("decay", "every"), [(0.0, 1), (0.9, 1), (0.5, 3), (1.0, 1)])
def test_a_teacher_that_follows(decay: float, every: int) -> None:
    """θ̄ ← d θ̄ + (1 − d) θ after every n-th update, in closed form; a step that is skipped moves no weight of θ."""
    optimizer, _ = make_optimizer(Optimizer(lr=1e-2), 9)
    rng = np.random.default_rng(0)
    start, past = toy_tree(rng), toy_tree(rng)
    state = TrainState(jnp.int32(0), jnp.int32(0), start, optimizer.init(start), past)
    state = jax.tree.map(jnp.asarray, state)
    update = make_update(toy_loss, optimizer, follow=(decay, every))
    followed = []
    for step in range(1, 8):
        rows = toy_tree(rng, 4)
        state, _ = update(state, jax.tree.map(lambda x, bad=step == 4: x * np.nan if bad else x, rows))
        if step % every == 0:
            followed.append(jax.device_get(state.params))
        n = len(followed)
        parts = [(decay**n, past), *((decay ** (n - 1 - j) * (1 - decay), w) for j, w in enumerate(followed))]
        want = jax.tree.map(
            lambda *w, p=parts: sum(c * np.float64(x) for (c, _), x in zip(p, w, strict=True)), *(w for _, w in parts)
        )
        assert distance(state.moving, want) < 1e-6
    if (decay, every) == (0.0, 1):
        jax.tree.map(np.testing.assert_array_equal, state.moving, state.params)


# --- off-policy texts and cached scores ---


@pytest.mark.parametrize("shards", [1, 4, 8])
def test_every_shard_and_part_has_its_share_of_texts(shards: int) -> None:
    rng = np.random.default_rng(0)
    layout = Layout(make_mesh(shards, devices=jax.devices()[:shards]))
    rollouts = tiny_runs.make_rollouts(32, response=6)
    pairs = [([1] * int(rng.integers(1, 6)), [i % VOCAB] * int(rng.integers(1, 6))) for i in range(16)]
    joined: Any = join_texts(rollouts, pairs, 6, 6, layout)
    parts: list[Any] = split(joined, 2, layout)
    for part in (joined, *parts):
        fixed = np.asarray(part.fixed).reshape(shards, -1)
        np.testing.assert_allclose(fixed.mean(1), 1 / 3, atol=0.5 / fixed.shape[1])
    if shards < 8:
        assert [int(np.sum(part.fixed)) for part in parts] == [8, 8]
    got = [
        (p[-n:].tolist(), t[:m].tolist())
        for p, n, t, m, f in zip(
            joined.prompts.tokens, joined.prompts.lengths, joined.tokens, joined.lengths, joined.fixed, strict=True
        )
        if f
    ]
    assert got == pairs
    np.testing.assert_array_equal(joined.tokens[~joined.fixed], rollouts.tokens)
    np.testing.assert_array_equal(joined.topk_ids[~joined.fixed], rollouts.topk_ids)


def off_policy(models: Path, fraction: float, **settings: Any) -> Setup:
    part = {"fraction": fraction, "data": TEXTS}
    return setup_on(models, (1, 1, 1), off_policy=part, objective={"name": "topk", "k": 4}, **settings)


def never(*_: Any) -> Any:
    raise AssertionError("sampled, or scored")


@pytest.fixture
def packed_rollouts(monkeypatch: pytest.MonkeyPatch) -> list[Rollouts]:
    """What ``Teaching.pack`` is given."""
    seen, pack_them = [], Teaching.pack

    def noted(self: Teaching, rollouts: Rollouts) -> Any:
        seen.append(rollouts)
        return pack_them(self, rollouts)

    monkeypatch.setattr(Teaching, "pack", noted)
    return seen


@pytest.mark.parametrize("fraction", [0.5, pytest.param(1.0, marks=pytest.mark.exhaustive)])
def test_a_step_on_texts(models: Path, packed_rollouts: list[Rollouts], fraction: float) -> None:
    """Loss and gradient norm; top-k on the ids that the live student finds most probable, sampled or not."""
    setup = off_policy(models, fraction)
    start = jax.device_get(setup.state.params)
    base = tiny_runs.make_rollouts(ROWS // 2, response=RESPONSE)  # their topk_ids are random: they must not be used

    def sample(_: Any, prompts: Any, *__: Any) -> Rollouts:
        assert len(prompts.lengths) == ROWS // 2
        return dataclasses.replace(base, prompts=prompts)

    setup = dataclasses.replace(setup, rollout=sample if fraction < 1 else never)
    assert (setup.batches.epochs().get("prompts") is None) == (fraction == 1)
    _, row, skipped = rollout_step(setup, setup.state, 1)
    assert not skipped
    (rollouts,) = packed_rollouts
    assert np.mean(np.asarray(rollouts.fixed)) == fraction
    text = behind(own_prompts(rollouts), rollouts)
    target = dense_logits(TEACHER, tiny_runs.params_of(TEACHER, 1), text)
    want, grads = dense_loss(start, text, target, np.float32(tiny_runs.response_mask(rollouts)), k=4)
    np.testing.assert_allclose(row["loss"], want, rtol=1e-5)
    norm = math.sqrt(sum(float(np.sum(np.float64(g) ** 2)) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(row["gradient_norm"], norm, rtol=1e-4)
    assert ("response_length" in row) == (fraction < 1)


def test_cached_scores(models: Path, tmp_path: Path) -> None:
    """The step of live scores; a second run scores nothing; files that are broken or of something else, again."""
    scored: list[int] = []

    def step(cache: bool = True, **settings: Any) -> tuple[Any, Any]:
        teacher = {"path": str(models / "teacher")} | ({"cache": str(tmp_path / "cache")} if cache else {})
        setup = off_policy(models, 1.0, teacher=teacher, **settings)
        assert setup.teaching

        def scorer(network: Any) -> Any:
            def score(params: Any, rows: Any) -> Any:
                scored.append(len(np.unique(np.asarray(rows.segments))) - 1)
                return setup.graphs.scorer(network)(params, rows)

            return score

        setup = dataclasses.replace(setup, rollout=never, teaching=dataclasses.replace(setup.teaching, score=scorer))
        before = jax.device_get(setup.state.params)
        state, row, _ = rollout_step(setup, setup.state, 1)
        return jax.tree.map(lambda a, b: np.asarray(a) - b, state.params, before), row

    want, row = step(cache=False)
    files = lambda: sorted((tmp_path / "cache").iterdir())  # noqa: E731
    for expected in (ROWS, 0):
        scored.clear()
        got, again = step()
        assert scored == [expected]
        assert distance(got, want) < 1e-5
        np.testing.assert_allclose(again["loss"], row["loss"], rtol=1e-6)
    assert [f.suffix for f in files()] == [".npy"] * ROWS
    whole = [f.read_bytes() for f in files()]
    files()[0].write_bytes(whole[0][:-5])
    files()[1].write_bytes(b"")
    files()[2].write_bytes(b"not an array")
    np.save(files()[3], np.zeros((3, 2), np.uint32))
    np.save(files()[4], np.load(files()[4]).view(np.float32))
    scored.clear()
    assert distance(step()[0], want) < 1e-5
    assert scored == [5]
    assert [f.read_bytes() for f in files()] == whole
    scored.clear()
    step(dtype="bfloat16")  # the teacher's weights are others then
    assert scored == [ROWS]
    assert len(files()) == 2 * ROWS


def test_a_cache_that_cannot_be_written_is_refused(models: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot"):
        off_policy(models, 1.0, teacher={"path": str(models / "teacher"), "cache": str(tmp_path / "file" / "cache")})


# --- rewards in a step ---


def test_rewards_of_a_step(models: Path) -> None:
    """Advantages of each prompt's responses; a row that could not be judged is left out of its group's mean."""
    setup = setup_on(
        models, (1, 1, 1), kind="grpo", rollout={"prompts": 2, "samples": 4, "max_response": RESPONSE},
        reward={"terms": {"length": 2.0, "format": 1.0}, "weight": 0.5, "buffer": 10, "skip_bad": True},
    )  # fmt: skip
    rollouts = sampled(setup)
    asked = []

    class Fake:
        bad: tuple[int, ...] = (2,)

        def __call__(self, rows: Any) -> Any:
            asked[:] = rows
            r = np.array([1.0, 0, 5, 0, 1, 1, 1, 1])
            r[list(self.bad)] = math.nan
            return {"length": r, "format": np.zeros(8)}

        total = setup.judge.total  # pyright: ignore[reportOptionalMemberAccess]

    judge: Any = Fake()
    got, row = rewarded(dataclasses.replace(setup, judge=judge), rollouts)
    r = np.array([2.0, 0, 0])  # of the first prompt, without the third
    a = 0.5 * (r - r.mean()) / (r.std(ddof=1) + 1e-6)
    np.testing.assert_allclose(np.asarray(got.advantage), [a[0], a[1], 0, a[2], 0, 0, 0, 0], rtol=1e-5)
    assert (row["reward_skipped"], row["reward_groups_alike"]) == (1, 0.5)
    np.testing.assert_allclose([row["reward"], row["reward/length"], row["reward/format"]], [10 / 7, 5 / 7, 0])
    for i, seen in enumerate(asked):
        record = setup.records[int(rollouts.prompts.ids[i])]
        text = setup.tokenizer.decode(
            np.asarray(rollouts.tokens)[i, : int(rollouts.lengths[i])].tolist(), skip_special_tokens=True
        )
        want = (record.id, record.problem, record.answer, text, int(rollouts.lengths[i]), bool(rollouts.stopped[i]))
        assert tuple(seen) == want
    judge.bad = tuple(range(8))
    with pytest.raises(InputError, match="none of the 8 responses of a step could be judged"):
        rewarded(dataclasses.replace(setup, judge=judge), rollouts)


# --- whole runs ---

REWARD = {"terms": {"length": 1.0, "format": 0.5}, "buffer": 10}
RUNS: dict[str, dict[str, Any]] = {
    "grpo": {"kind": "grpo", "reward": REWARD},
    "reward": {"reward": REWARD, "objective": {"name": "topk", "k": 4, "weight": 0.5}},
    "texts": {"off_policy": {"fraction": 0.5, "data": TEXTS}, "cached": True},
    "updates on texts": {"off_policy": {"fraction": 0.5, "data": TEXTS}, "updates": 2},
    "self": {"data": MIX, "path": "student", "teacher": {"decay": 0.9, "every": 2, "context": CONTEXT}},
    "live": {"path": "past", "teacher": {"decay": 0.0}},
    "two teachers": {"data": MIX, "two": True, "objective": {"name": "full", "k": 4, "scale": 1.2}},
}  # fmt: skip


def run_config(models: Path, name: str, run_dir: Path) -> Config:
    settings = {"steps": 5, "checkpoint": {"every": 2}, "log_samples": 0, "mesh": {"data": 1, "fsdp": 1, "tensor": 8}}
    settings |= RUNS[name] | {"pack": name != "grpo"}
    kind, path = settings.pop("kind", "opd"), settings.pop("path", "teacher")
    own = settings.pop("teacher", {}) | ({"cache": str(models / "cache")} if settings.pop("cached", False) else {})
    if settings.pop("two", False):
        settings["more_teachers"] = [{"path": str(models / "second"), "sources": ["two"], "weight": 2.0}]
    if kind == "opd":
        settings["teacher"] = own | {"path": str(models / path)}
    return tiny_runs.run_config(models, run_dir, kind, **settings)


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "write_report", lambda *_: None)


@pytest.mark.long
@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_stopped_ends_like_one_that_was_not(
    models: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, no_report: None
) -> None:
    """Weights, optimizer, moving teacher, data position and logs, bit by bit; stopped between checkpoints."""
    straight, broken = (run_config(models, name, tmp_path / run) for run in ("straight", "broken"))
    train(straight)
    stop, write = threading.Event(), MetricWriter.write

    def write_and_stop(self: MetricWriter, step: int, metrics: Any) -> None:
        write(self, step, metrics)
        if step == 3:
            stop.set()

    with monkeypatch.context() as patch:
        patch.setattr(MetricWriter, "write", write_and_stop)
        with pytest.raises(Interrupted, match="after step 3 of 5"):
            train(broken, stop=stop)
    train(broken, resume=True)
    got, want = (log_rows(tmp_path / run, "metrics") for run in ("broken", "straight"))
    assert got == want
    (state, position), (wanted, wanted_position) = final_state(broken), final_state(straight)
    assert position == wanted_position
    jax.tree.map(np.testing.assert_array_equal, state, wanted)
    assert bool(state.moving) == (name in ("self", "live"))
    assert len({row["loss"] for row in got[:2]}) == 2
    if name == "live":  # after the first update the teacher is the student
        assert got[0]["loss"] > 0.1
        np.testing.assert_allclose([row["loss"] for row in got[1:]], 0, atol=1e-6)
        np.testing.assert_allclose([row["gradient_norm"] for row in got[1:]], 0, atol=1e-4)
        np.testing.assert_allclose([row["overlap_ratio"] for row in got[1:]], 1)
        jax.tree.map(np.testing.assert_array_equal, state.moving, state.params)
    if name in ("grpo", "reward"):
        assert all(row["reward"] < 0 for row in got)
    if name == "texts":
        assert got[-1]["epoch/prompts"] * 64 == got[-1]["epoch/texts"] * 32 / 2 == 10


root = test_hosts.root


@pytest.mark.long
def test_two_processes_of_grpo_give_the_numbers_of_one(root: Path, no_report: None) -> None:
    def config(name: str) -> Config:
        common: dict[str, Any] = {"optimizer": {"lr": 3e-4}, "checkpoint": {"every": 2}, "mesh": test_hosts.MESH}
        return tiny_runs.run_config(root, root / name, "grpo", steps=test_hosts.STEPS, reward=REWARD, **common)

    train(config("grpo_one"))
    code, out = test_hosts.finish(test_hosts.start(root, config("grpo_two"), 2))
    assert code == 0, out
    test_hosts.assert_same_numbers(root / "grpo_two", root / "grpo_one")
    logged = [json.loads(line) for line in (root / "grpo_two" / "metrics.jsonl").read_text().splitlines()]
    assert any(row["reward_groups_alike"] < 1 for row in logged)
