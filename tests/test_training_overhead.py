"""What a step does besides its programs: nothing compiles after the second, nothing comes to the host unasked."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_runs
from jax._src.array import ArrayImpl

from opd_jax.config_files import dump_config
from opd_jax.sampling.decode import bucket
from opd_jax.tracking.run_dir import RunDir, open_run, read_rows
from opd_jax.tracking.writers import MetricWriter
from opd_jax.training import loop
from opd_jax.training.loop import train
from opd_jax.training.setup import prepare, rollout_law
from opd_jax.training.stages import rollout_step, sft_step

COMPILED = "/jax/core/compile/backend_compile_duration"  # also where the persistent cache has it
IMPLICIT = ("__array__", "__int__", "__float__", "__bool__", "__index__", "__iter__", "item", "tolist")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, list[str]]]:
    """Step → programs compiled since the row of the step before was written."""
    by_step: dict[int, list[str]] = {}
    new: list[str] = []

    def listen(event: str, duration_secs: float, **told: Any) -> None:
        if event == COMPILED:
            new.append(told.get("fun_name", ""))

    def counting(self: MetricWriter, step: int, row: Any) -> None:
        write(self, step, row)
        by_step[step] = list(new)
        new.clear()

    write = MetricWriter.write
    monkeypatch.setattr(MetricWriter, "write", counting)
    monkeypatch.setattr(loop, "write_report", lambda *_: None)
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield by_step
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["opd", "sft"])
def test_nothing_compiles_after_the_second_step(
    kind: str, models: Path, tmp_path: Path, compiled: dict[int, list[str]]
) -> None:
    """Prompts, responses and packed rows of other lengths at every step; evaluations and checkpoints in between."""
    rng = np.random.default_rng(0)
    problems = [" ".join(["2 *"] * n) + " 4" for n in rng.integers(1, 8, 64)]  # 3 … 15 tokens
    rows = [{"problem": p, "answer": "1", "response": "2 * 4 = 3"} for p in problems]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": str(tmp_path / "rows.jsonl"), "chat": False, "max_prompt": 16}
    config = tiny_runs.run_config(
        models, tmp_path / kind, kind, steps=7, checkpoint={"every": 2}, profile=[4, 5],
        data=data | ({"response": "response"} if kind == "sft" else {}),
        evaluation={"data": data, "problems": 4, "samples": 2, "batch": 8, "every": 2},
    )  # fmt: skip
    train(config)
    assert "jit(update)" in compiled[1]
    # between the second row and the third, a first checkpoint
    assert set(compiled[2] + compiled[3]) <= {"jit(_bit_sums)", "jit(slice)"}, compiled
    assert not any(compiled[step] for step in range(4, 8)), compiled
    look_at(open_run(config.run_dir, dump_config(config), resume=True), kind)


def look_at(run: RunDir, kind: str) -> None:
    """The times of all stages, and what the samples and the profile hold."""
    stages = {"opd": {"data", "reshard", "rollout", "pack", "score", "update"}, "sft": {"data", "pack", "update"}}[kind]
    for row in read_rows(run.metrics):
        timed = {name.removeprefix("time/") for name in row if name.startswith("time/")}
        # they come after a step, and stand in the row of the next
        assert timed == stages | ({"evaluation", "checkpoint"} if row["step"] in (3, 5, 7) else set())
        rates = {name.partition("/")[2] for name in row if name.startswith("tokens_per_second/")}
        assert rates == stages & {"rollout", "score", "update"}
        assert "mfu" not in row  # a CPU has no published peak
    samples = [row for row in read_rows(run.samples) if row["who"] == "student"]
    assert {row["step"] for row in samples} == {0, 2, 4, 6, 7}
    for row in samples if kind == "opd" else []:
        assert len(row["tokens"]) == len(row["kl_by_token"]) <= 10
        assert {len(row[name]) for name in ("logp", "logq", "top_student", "top_teacher")} == {len(row["tokens"])}
        assert {len(listed) for listed in row["top_teacher"]} == {5}
        assert "".join(row["tokens"]).strip().startswith(row["response"][:3])
    if kind == "opd":
        evaluation = {row["step"]: row["reverse_kl"] for row in read_rows(run.evaluations) if row["who"] == "student"}
        last = [x for row in samples if row["step"] == 7 for x in row["kl_by_token"]]
        # four of the eight responses, all ten tokens long
        assert 0.3 < np.mean(last) / evaluation[7] < 3
    assert len(list(run.profile.glob("plugins/profile/*/*.xplane.pb"))) == 1


def test_prompt_widths_are_few(models: Path, tmp_path: Path) -> None:
    """A batch whose longest prompt has another length runs in the same programs; only a ladder of widths compiles."""
    setup = prepare(tiny_runs.run_config(models, tmp_path / "run"))
    engine = setup.graphs.engine(setup.student)
    weights = engine.cast(setup.state.params)
    law = rollout_law(setup.config)
    sizes = []
    for longest in range(1, 9):
        prompts: Any = next(setup.batches)
        prompts = prompts.replace(lengths=np.minimum(prompts.lengths, longest))
        setup.rollout(weights, prompts, law, 0, longest)
        prefill: Any = engine.prefill
        sizes.append(prefill._cache_size())
    assert len(set(sizes)) == 1
    assert bucket(1000, 16) == 1024


@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts explicit fetches (jax.device_get) and values of arrays that Python asked for by itself.

    jax.transfer_guard_device_to_host sees nothing on CPU, where the host reads device memory in place.
    """
    seen: Counter[str] = Counter()
    inside = [False]

    def explicit(tree: Any) -> Any:
        seen["explicit"] += 1
        inside[0] = True
        try:
            return device_get(tree)
        finally:
            inside[0] = False

    device_get = jax.device_get
    monkeypatch.setattr(jax, "device_get", explicit)
    for name in IMPLICIT:
        original = getattr(ArrayImpl, name)

        def asked(self: Any, *args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            if not inside[0]:
                seen[name] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(ArrayImpl, name, asked)
    return seen


@pytest.mark.parametrize(("kind", "expected"), [("opd", 6), ("sft", 3)])
def test_fetches_are_explicit_and_few(
    kind: str, expected: int, models: Path, tmp_path: Path, fetches: Counter[str]
) -> None:
    """Metrics; step and skipped updates; learning rate. A rollout: its prompts, one segment's flags, and its tokens."""
    setup = prepare(tiny_runs.run_config(models, tmp_path / kind, kind))
    state, step_fn = setup.state, rollout_step if kind == "opd" else sft_step
    for step in (1, 2):
        fetches.clear()
        with jax.transfer_guard_device_to_host("disallow"):  # of use on an accelerator
            state, _, _ = step_fn(setup, state, step)
    assert dict(fetches) == {"explicit": expected}
    for ask in (int, float, np.asarray):  # such would be seen
        fetches.clear()
        ask(state.skipped)
        assert set(fetches) - {"explicit"}, ask
