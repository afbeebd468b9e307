"""opd compare: which variants there are, that they start alike, that nothing is repeated, and what is concluded."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from etils import epath
from scipy import stats
from tiny_runs import run_config

from opd_jax import compare as package
from opd_jax.compare import compare, compare_compiled, compiled
from opd_jax.compare import runs as compare_module
from opd_jax.compare.result import YARDSTICK, _jointly, compare_runs, efficient, paired, step_times
from opd_jax.compare.runs import _SameRollouts, run_all, runs_of
from opd_jax.compare.section import compiled_section, section
from opd_jax.compare.variants import EFFECTIVE, make_variants, shown
from opd_jax.config import Config, Objective
from opd_jax.errors import Failed, InputError, Interrupted
from opd_jax.evaluation.scores import student_t
from opd_jax.losses.reference import reference_loss
from opd_jax.mesh import Layout, make_mesh
from opd_jax.plan.collectives import count_collectives
from opd_jax.tracking.run_dir import RunDir, read_rows
from opd_jax.tracking.sections import body
from opd_jax.training import loop
from opd_jax.training.loop import train
from opd_jax.training.throughput import loss_flops

VARY = ["objective.name=full,topk"]
DONE_BEFORE_REPORT: list[bool] = []
STEPS, SEEDS = 2, 2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write_models(tmp_path_factory.mktemp("networks"))


def config(models: Path, **changes: Any) -> Config:
    data = {"source": f"task:{tiny_runs.TASK}", "split": "test", "chat": False, "max_prompt": 8, "limit": 8}
    settings: dict[str, Any] = {
        "steps": STEPS,
        "objective": {"name": "full", "k": 1},
        "metrics_k": 4,
        "evaluation": {"data": data, "problems": 8, "batch": 8},
        "rollout": {"prompts": 4, "samples": 2, "max_response": 4},
        "checkpoint": {"every": 1},
        "log_samples": 0,
    }
    return run_config(models, Path("given"), **settings | changes)


@pytest.fixture(scope="module")
def made(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Full KL and Eq. 5 at k = 1, two seeds: where it lies, and its result."""
    out = tmp_path_factory.mktemp("compared") / "out"

    def report(run: RunDir, _: Any) -> None:  # half of a short run's seconds, and tested elsewhere
        DONE_BEFORE_REPORT.append(run.summary.exists())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "write_report", report)
        return out, compare(config(models), VARY, SEEDS, out)


# variants


def names(models: Path, *vary: str, **changes: Any) -> list[str]:
    return [v.name for v in make_variants(config(models, **changes), vary)[0]]


def test_k_sizes_nothing_where_no_support_is_taken(models: Path) -> None:
    variants, dropped = make_variants(config(models), ["objective.name=sampled,full,topk", "objective.k=1,4,16"])
    assert [v.name for v in variants] == ["sampled", "full", "topk k=1", "topk k=4", "topk k=16"]
    assert [v.config.objective.k for v in variants] == [1, 1, 1, 4, 16]
    assert {v.config.overlap_k for v in variants} == {4}
    assert len({v.directory for v in variants}) == 5
    assert [(shown(d.settings), d.why) for d in dropped] == [
        (f"objective.name={name} objective.k={k}", f"alike {name}: objective.k has no effect there")
        for name in ("sampled", "full")
        for k in (4, 16)
    ]


def test_the_lists_of_the_overlap_are_those_of_the_file(models: Path) -> None:
    given = config(models, objective={"name": "full", "k": 7}, metrics_k=None)
    variants, _ = make_variants(given, ["objective.name=topk,full", "objective.k=1,2"])
    assert {v.config.overlap_k for v in variants} == {7}


def test_combinations_that_are_refused_are_dropped(models: Path) -> None:
    variants, dropped = make_variants(config(models), ["objective.name=topk,sampled", "objective.correction=none,tis"])
    assert [v.name for v in variants] == ["topk correction=none", "sampled correction=none", "sampled correction=tis"]
    assert "weights a policy gradient" in dropped[0].why


def test_values_and_names(models: Path) -> None:
    vary = ["optimizer.lr=1e-3,0.01", "positions.horizon={start: 4, steps: 3},null"]
    assert names(models, *vary) == [
        f"lr={lr} horizon={h}" for lr in (0.001, 0.01) for h in ('{"start": 4, "steps": 3}', "null")
    ]
    assert names(models, "objective.temperature=1.0,0.5", "objective.weight=1.0,2.0")[0] == "temperature=1.0 weight=1.0"
    assert names(models, "objective.tail=true,false", objective={"name": "topk"}) == ["tail=true", "tail=false"]


@pytest.mark.parametrize(
    ("vary", "said"),
    [
        ([], "--vary: give what is to be compared"),
        (["objective.name"], r"expected key=value,value"),
        (["objective.nam=a,b"], r"objective.nam: unknown key; did you mean 'name'\?"),
        (["objectiv.name=a,b"], r"objectiv: unknown key; did you mean 'objective'\?"),
        (["objective.name=full,fully"], "objective.name: Input should be 'sampled'"),
        (["objective.name=sampled,full", "objective.k=4,x"], "objective.k: Input should be a valid integer"),
        (["objective.name=full"], "one value. Give two or more"),
        (["objective.name=full,full"], "one value"),
        (["objective.k=1,4"], "come to one variant"),
        (["objective.name=full,topk", "objective.name=sampled,full"], "has a list already"),
        (["rollout.temperature=0.5,1.0"], "may not differ between variants: it would change what is sampled"),
        (["seed=1,2"], "the seeds are those of --seeds"),
        (["mesh.data=1,2"], r"may not differ.*These may: objective\.…"),
        (["student.path=a,b"], "may not differ"),
        (["run_dir=a,b"], "its own directory"),
        (["optimizer.lr=.nan,1e-3"], "optimizer.lr: Input should be a finite number"),
        (
            ["optimizer={lr: 1e-3},{lr: 1e-4}", "optimizer.warmup=1,2"],
            "--vary optimizer: optimizer.warmup, a part of it, has a list, too",
        ),
    ],
)
def test_bad_lists(models: Path, vary: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make_variants(config(models), vary)


VALUES: dict[str, tuple[Any, Any]] = {
    "k": (2, 5),
    "support": ("student", "teacher"),
    "normalise": (True, False),
    "tail": (False, True),
    "divergence": ("reverse", "forward"),
    "beta": (0.3, 0.6),
    "alpha": (0.3, 0.6),
}


@pytest.mark.parametrize(
    ("name", "divergence"),
    [
        ("sampled", "reverse"),
        ("topk_reference", "reverse"),
        *itertools.product(("full", "topk"), ("reverse", "jsd", "skew")),
    ],
)
def test_what_has_no_effect_changes_no_bit_of_the_gradient(name: str, divergence: str) -> None:
    """The table against the losses themselves."""
    rng = np.random.default_rng(0)
    hidden, teacher = (jnp.asarray(rng.normal(size=(1, 6, 5)), jnp.float32) for _ in range(2))
    head, teacher_head = (jnp.asarray(rng.normal(size=(9, 5)), jnp.float32) for _ in range(2))
    tokens, mask = jnp.asarray(rng.integers(0, 9, (1, 6))), jnp.ones((1, 6), bool)
    assert {key.partition(".")[2] for key in EFFECTIVE} == set(VALUES)

    def gradient(**settings: Any) -> np.ndarray:
        objective = Objective(**{"name": name, "divergence": divergence, "k": 3} | settings)

        def loss(h: Any) -> Any:
            return reference_loss(h, head, teacher, teacher_head, tokens, mask, objective)[0]

        return np.asarray(jax.grad(loss)(hidden))

    for key, values in VALUES.items():
        try:
            a, b = (gradient(**{key: value}) for value in values)
        except ValueError:
            continue  # refused by Objective: no variant either
        given = Objective(name=name, divergence=divergence).model_dump()  # pyright: ignore[reportArgumentType]
        assert EFFECTIVE[f"objective.{key}"](given) == (not np.array_equal(a, b)), key


# runs


def test_all_variants_of_a_seed_start_alike(made: tuple[Path, dict[str, Any]]) -> None:
    out, result = made
    digests = [[run["rollouts"] for run in row["runs"]] for row in result["variants"]]
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == SEEDS
    for seed in range(SEEDS):
        first, other = (
            read_rows(runs_place(out, name, seed) / "evaluations.jsonl") for name in ("full", "topk")
        )  # teacher and student, step 0
        assert first[:2] == other[:2]
        assert first[-1] != other[-1]


def runs_place(out: Path, variant: str, seed: int) -> Any:
    return epath.Path(out) / variant / f"seed-{seed}"


def test_one_yardstick(made: tuple[Path, dict[str, Any]]) -> None:
    """The overlap of all is that of lists of 4, though one trains on k = 1, and Eq. 5 with it does not learn."""
    _, result = made
    assert result["metrics_k"] == 4
    assert result["metrics"] == [
        "accuracy", "reverse_kl", "forward_kl", "forward_kl_teacher_rollouts", "overlap_ratio", "entropy_gap",
    ]  # fmt: skip
    full, top1 = result["variants"]
    assert all(run["gradient_norm"]["max"] > 0.01 for run in full["runs"])
    assert all(run["gradient_norm"]["max"] == 0 for run in top1["runs"])
    assert "Does not learn: topk. The gradient is zero at every step (norm below 1e-06)." in section(result).lead


def test_differences_against_scipy(made: tuple[Path, dict[str, Any]]) -> None:
    out, result = made
    values = np.array([
        [read_rows(runs_place(out, name, seed) / "evaluations.jsonl")[-1]["reverse_kl"] for seed in range(SEEDS)]
        for name in ("full", "topk")
    ])  # fmt: skip
    found = result["variants"][1]["difference"]["reverse_kl"]
    interval = stats.ttest_rel(values[1], values[0]).confidence_interval(0.95)
    assert found["mean"] == pytest.approx(np.mean(values[1] - values[0]))
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))
    assert result["variants"][0]["difference"] is None
    assert result["variants"][1]["final"]["reverse_kl"]["mean"] == pytest.approx(values[1].mean())


def test_student_t_against_scipy() -> None:
    values = np.random.default_rng(0).normal(size=5)
    low, high = stats.t.interval(0.95, 4, values.mean(), stats.sem(values))
    found = student_t(values.tolist())
    assert (found["low"], found["high"], found["error"]) == pytest.approx((low, high, stats.sem(values)))
    low, high = stats.t.interval(1 - 0.05 / 3, 4, values.mean(), stats.sem(values))
    assert tuple(student_t(values.tolist(), 3)[name] for name in ("low", "high")) == pytest.approx((low, high))
    for known in ([2.0], [2.0] * 3, [0.0] * 3, [0.7 - 0.4, 0.6 - 0.3]):  # the last two differ by rounding
        assert student_t(known) == {"mean": pytest.approx(known[0]), "error": None, "low": None, "high": None}
    assert paired([3.0, 5.0], [1.0, 2.0])["mean"] == 2.5


def written(root: Path) -> dict[str, int]:
    return {str(p.relative_to(root)): p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}


def of_runs(files: dict[str, int]) -> dict[str, int]:
    return {name: time for name, time in files.items() if "/" in name}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """What is trained from here on: title, and whether it went on."""
    seen: list[tuple[str, bool]] = []

    def counted(config: Config, *, resume: bool, title: str, **more: Any) -> Any:
        seen.append((title, resume))
        return train(config, resume=resume, title=title, **more)

    monkeypatch.setattr(compare_module, "train", counted)
    monkeypatch.setattr(package, "local_updates", lambda *_: None)  # as before, and seconds
    return seen


def test_what_is_done_is_not_repeated(made: tuple[Path, dict[str, Any]], models: Path, trained: list[Any]) -> None:
    out, result = made
    before = written(out)
    again = compare(config(models), VARY, SEEDS, out)
    assert trained == []
    assert of_runs(written(out)) == of_runs(before)
    assert [v["final"] for v in again["variants"]] == [v["final"] for v in result["variants"]]


@pytest.fixture
def killed(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy, as a kill in the third of the four runs leaves it."""
    out = tmp_path / "copy"
    shutil.copytree(made[0], out)
    shutil.rmtree(out / "topk/seed-1")
    shutil.rmtree(out / f"full/seed-1/checkpoints/{STEPS}")
    (out / "full/seed-1/summary.json").unlink()
    return out


def test_after_a_kill_only_the_rest_is_run(killed: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(compare_module, "train", lambda config, *, resume, title, **_: seen.append((title, resume)))
    run_all(runs_of(make_variants(config(models), VARY)[0], SEEDS, killed), killed)
    assert seen == [("full, seed 1", True), ("topk, seed 1", False)]


@pytest.mark.long
def test_a_kill_in_the_middle_changes_no_number(
    killed: Path, made: tuple[Path, dict[str, Any]], models: Path, trained: list[Any]
) -> None:
    out, result = killed, made[1]
    again = compare(config(models), VARY, SEEDS, out)
    assert trained == [("full, seed 1", True), ("topk, seed 1", False)]
    for name in ("by_seed", "difference", "curves"):
        assert [v[name] for v in again["variants"]] == [v[name] for v in result["variants"]]
    assert json.loads((out / "compare.json").read_text())["order"] == again["order"]


def test_another_comparison_is_not_mixed_in(
    made: tuple[Path, dict[str, Any]], models: Path, trained: list[Any], tmp_path: Path
) -> None:
    out, before = made[0], written(made[0])
    for changes, vary, said in (
        ({"steps": 5}, VARY[0], "variants.full.steps: there 2, now 5"),
        ({}, "objective.name=full,sampled", r"variants.topk.*there"),
    ):
        with pytest.raises(InputError, match=rf"(?s)holds another comparison.*{said}.*another --out"):
            compare(config(models, **changes), [vary], SEEDS, out)
    (tmp_path / "mine").write_text("")
    with pytest.raises(InputError, match="not empty, and no comparison is there"):
        compare(config(models), VARY, SEEDS, tmp_path)
    assert trained == []
    assert written(out) == before


@pytest.mark.exhaustive
def test_what_changes_the_sampling_ends_the_comparison(
    made: tuple[Path, dict[str, Any]], models: Path, tmp_path: Path
) -> None:
    """Keys that may vary do not; one that did would be noticed at its first step."""
    rows = read_rows(runs_place(made[0], "full", 0) / "metrics.jsonl")
    variants, _ = make_variants(config(models), VARY)
    warm = variants[1].config.model_copy(
        update={"rollout": variants[1].config.rollout.model_copy(update={"temperature": 0.7})}
    )
    first, other = runs_of([variants[0], dataclasses.replace(variants[1], config=warm)], 1, tmp_path)
    same = _SameRollouts()
    same.check(first, rows[0])
    steps = []

    def each_step(step: int, row: dict[str, Any]) -> None:
        steps.append(step)
        same.check(other, row)

    with pytest.raises(Failed, match="seed 0: the first rollouts of full and topk differ"):
        train(other.config, each_step=each_step)
    assert steps == [1]


def test_runs_that_differ_are_noticed_before_more_is_run(
    made: tuple[Path, dict[str, Any]], models: Path, trained: list[Any], tmp_path: Path
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(made[0], out)
    log = out / "topk/seed-1/metrics.jsonl"
    log.write_text(log.read_text().replace('"rollouts": "', '"rollouts": "f', 1))
    (out / "topk/seed-0/summary.json").unlink()
    with pytest.raises(Failed, match="seed 1: the first rollouts of full and topk differ"):
        compare(config(models), VARY, SEEDS, out)
    assert trained == []


def test_a_stop_is_kept_between_runs(models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import threading

    stop = threading.Event()
    done: list[str] = []

    def quick(config: Config, *, title: str, each_step: Any, **_: Any) -> list[Any]:
        each_step(1, {"rollouts": "a"})
        done.append(title)
        stop.set()
        return []

    monkeypatch.setattr(compare_module, "train", quick)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.comparison.json.tmp").write_text("{")  # as a kill leaves it
    runs = runs_of(make_variants(config(models), VARY)[0], 2, tmp_path / "out")
    assert [run.title for run in runs] == [f"{name}, seed {seed}" for seed in (0, 1) for name in ("full", "topk")]
    with pytest.raises(Interrupted, match="stopped after full, seed 0; give the same command"):
        run_all(runs, tmp_path / "out", stop)
    assert done == ["full, seed 0"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluation": {}}, "no held-out prompts to compare on. Add evaluation.data="),
        ({"kind": "grpo", "reward": {}, "objective": {"name": "sampled"}}, "kind=grpo; variants are measured against"),
        ({"student": {"path": "absent"}}, "absent: no such directory"),
    ],
)
def test_what_cannot_be_compared_leaves_nothing(
    models: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        compare(config(models, **changes), VARY, 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written(models: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file/out"
    with pytest.raises(InputError, match=r"--out .*file/out: cannot be written \(Not a directory\)"):
        compare(config(models), VARY, 1, out)


def test_a_run_counts_as_done_when_its_report_is_written(made: tuple[Path, dict[str, Any]]) -> None:
    assert made[1]["variants"]
    assert DONE_BEFORE_REPORT == [False] * 2 * SEEDS


# what is concluded


def test_frontier_by_brute_force() -> None:
    rng = np.random.default_rng(1)
    points = {str(i): (float(c), float(s)) for i, (c, s) in enumerate(rng.integers(0, 6, (40, 2)))}
    kept = efficient(points, dict.fromkeys(points, 0))
    for name, (cost, score) in points.items():
        beaten = any((c < cost and s >= score) or (c <= cost and s > score) for c, s in points.values())
        assert (name in kept) != beaten
    assert max(score for _, score in points.values()) in [points[name][1] for name in kept]


def test_times_within_the_spread_of_seeds_are_alike() -> None:
    points = {"a": (10.0, 0.5), "b": (10.5, 0.6), "c": (11.2, 0.6), "d": (5.0, 0.1), "e": (10.9, 0.6)}
    assert efficient(points, {"a": 0.6, "b": 0.1, "c": 0.2, "d": 0.1, "e": 0.5}) == ["b", "d", "e"]
    assert efficient(points, dict.fromkeys(points, 0.0)) == ["a", "b", "d"]


def test_certain_is_what_is_so_for_all_variants_at_once(made: tuple[Path, dict[str, Any]]) -> None:
    rng = np.random.default_rng(2)
    before, last, other = rng.normal(size=(3, 4))
    held, first = (
        [{"student": [{"accuracy": a}, {"accuracy": b}]} for a, b in zip(before, values, strict=True)]
        for values in (last, other)
    )
    found = _jointly(held, first, "accuracy", 5)
    for name, against, level in (("learnt", before, 1 - 0.05 / 5), ("difference", other, 1 - 0.05 / 4)):
        interval = stats.ttest_rel(last, against).confidence_interval(level)
        assert (found[name]["low"], found[name]["high"]) == pytest.approx((interval.low, interval.high))
    assert _jointly(first, first, "accuracy", 5)["difference"] is None

    result = copy.deepcopy(made[1])
    by, (full, top1) = result["by"], result["variants"]
    top1["difference"][by] = top1["learnt"][by] = {"mean": 2.0, "error": 0.5, "low": 1.0, "high": 3.0}
    wide = {"mean": 2.0, "error": 0.5, "low": -1.0, "high": 5.0}
    top1["jointly"] = {"learnt": wide, "difference": wide}
    top1["runs"][0]["gradient_norm"]["max"] = 1.0
    same = full["jointly"]["learnt"] = {"mean": 0.1, "error": None, "low": None, "high": None}
    lead = " ".join(section(result).lead)
    assert "Certainly" not in lead
    assert "Not certain to have learnt" in lead
    assert {"full", "topk"} == set(lead.partition("before and after): ")[2].rstrip(".").split(", "))
    top1["jointly"] = {"learnt": same, "difference": top1["difference"][by]}
    word = "better" if YARDSTICK[by] > 0 else "worse"
    assert f"Certainly {word} than full" in " ".join(section(result).lead)


def test_times_leave_out_what_compiles() -> None:
    def row(update: float, measured: bool) -> dict[str, Any]:
        return {"time/rollout": 1.0, "time/update": update, "time/evaluation": 9.0, "tokens_per_second": 5.0} | (
            {"overlap_ratio": 0.5} if measured else {}
        )

    rows = [row(50, True), row(40, False), row(2, False), row(4, False), row(7, True), row(3, False)]
    assert step_times(rows) == {
        "rollout": 1.0, "update": 3.0, "step": 4.0, "metrics": 4.0, "tokens_per_second": 5.0,
    }  # fmt: skip
    every = step_times([row(50, True), row(2, True), row(3, True)])
    assert (every["update"], every["metrics"]) == (2.5, None)
    assert step_times(rows[:1])["step"] is None


def test_a_corpus_and_unknown_times(made: tuple[Path, dict[str, Any]], models: Path, tmp_path: Path) -> None:
    """Nothing is sampled: no digests, no lengths; and of no step is the time known."""
    shutil.copytree(made[0], tmp_path / "out")
    for log in (tmp_path / "out").glob("*/*/metrics.jsonl"):
        gone = ("rollouts", "response_length", "time/update")
        rows = [{k: v for k, v in row.items() if k not in gone} for row in read_rows(epath.Path(log))]
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": f"task:{tiny_runs.TASK}", "chat": False, "max_prompt": 8, "response": "response"}
    given = config(models, off_policy={"fraction": 1.0}, data=data)
    runs = runs_of(make_variants(given, VARY)[0], SEEDS, tmp_path / "out")
    result = compare_runs(runs, [], None, "8 × cpu", {"data": 8})
    assert result["rollouts"] == 0
    assert [row["efficient"]["seconds"] for row in result["variants"]] == [False, False]
    found = section(result)
    assert "bit by bit" not in " ".join(found.lead)
    assert "bit by bit" in " ".join(section(made[1]).lead)
    assert len(found.plots) == 3


def test_costs(made: tuple[Path, dict[str, Any]], models: Path) -> None:
    """Bytes come from the compiler, FLOPs from the texts of each step, without the metrics."""
    out, result = made
    full, top1 = result["variants"]
    for row, variant in zip((full, top1), make_variants(config(models), VARY)[0], strict=True):
        given = variant.config
        assert row["memory"]["update"]["total"] > row["memory"]["update"]["temp"] > 0
        assert row["memory"]["measured"] is None  # every step measures
        logged = [read_rows(runs_place(out, row["name"], seed) / "metrics.jsonl") for seed in range(SEEDS)]
        tokens = [8 * r["response_length"] for rows in logged for r in rows]
        with_, without = (
            np.array([loss_flops(given, tiny_runs.STUDENT, tiny_runs.TEACHER, n, metrics=m) for n in tokens])
            for m in (True, False)
        )
        of_metrics = with_ - without
        all_of_it = np.mean([sum(r["update_flops"] for r in rows) for rows in logged])
        assert row["cost"]["metrics_flops"] == pytest.approx(np.mean(of_metrics))
        assert row["cost"]["flops"] == pytest.approx(all_of_it - STEPS * np.mean(of_metrics))
    assert top1["cost"]["metrics_flops"] > full["cost"]["metrics_flops"] == 0
    assert top1["cost"]["flops"] < full["cost"]["flops"]
    assert top1["efficient"]["flops"]


def test_what_people_see(made: tuple[Path, dict[str, Any]]) -> None:
    out, result = made
    found = section(json.loads((out / "compare.json").read_text()))  # a stored result is shown alike
    assert [row[0] for row in found.tables[0].rows] == result["order"]
    assert all(len(row) == len(t.columns) for t in found.tables for row in t.rows)
    text = body(found)
    assert "nan" not in text.replace("nance", "")
    assert text.count("<svg") == len(found.plots) == 4
    assert {p.name for p in out.iterdir()} >= {"comparison.json", "compare.json", "compare.html", "compare-4.png"}


def test_many_variants_are_told_apart() -> None:
    from opd_jax.compare.section import _styles

    styles = _styles({"variants": [{"name": str(i)} for i in range(12)]})
    assert len({(s["color"], str(s["linestyle"])) for s in styles.values()}) == 12


# compiled


COMPILED = {
    "update": {"total": 2**30, "temp": 2**20, "over": False, "collectives": {}, "cpu_seconds": 1.0},
    "measured": None,
}


@pytest.mark.exhaustive
def test_compiled_for_a_topology(models: Path, tmp_path: Path) -> None:
    """Bytes, FLOPs and transfers side by side, of the same programs as `opd plan`."""
    given = config(models, mesh={"data": 1, "fsdp": 4, "tensor": 2}, evaluation={})
    result = compare_compiled(given, VARY, "cpu-8", tmp_path / "out")
    full, top1 = result["variants"]
    assert top1["flops"] < full["flops"]
    assert full["update"]["total"] > full["update"]["temp"] > 0
    assert full["update"]["collectives"]["all-gather"]["count"] >= 2
    assert full["measured"] is None
    found = compiled_section(result)
    assert found.tables[0].rows[0][0] == "full"
    assert all(len(row) == len(found.tables[0].columns) for row in found.tables[0].rows)
    assert (tmp_path / "out" / "compare-cpu-8.html").exists()


def test_rows_and_flops_are_those_of_each_variants_update(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "compiled_updates", lambda variants, *_: [copy.deepcopy(COMPILED) for _ in variants])
    result = compare_compiled(config(models, mesh={"data": 2, "fsdp": 4}), ["updates=1,2"], "cpu-8")
    one, two = compiled_section(result).tables[0].rows
    assert (one[1], two[1]) == (8, 4)
    assert one[2] == pytest.approx(2 * two[2])


def test_only_distillation_is_compared_on_a_topology(models: Path) -> None:
    with pytest.raises(InputError, match="kind=grpo; variants are measured against a teacher"):
        compare_compiled(config(models, kind="grpo", reward={}, objective={"name": "sampled"}), VARY, "cpu-8")


def test_transfers_of_a_loop_count_as_often_as_it_runs() -> None:
    mesh = Layout(make_mesh(8))
    layout, whole = mesh.sharding(("batch",)), mesh.sharding()
    weights = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=whole)
    rows = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=layout)

    @jax.jit
    def f(w: Any, h: Any) -> Any:
        def one(h: Any, w: Any) -> Any:
            h = jax.lax.with_sharding_constraint(h @ w, whole)
            return jax.lax.with_sharding_constraint(jnp.tanh(h), layout), None

        return jax.lax.scan(one, h, w)[0].sum()

    found = count_collectives(f.lower(weights, rows).compile().as_text() or "")
    assert found["all-gather"] == {"count": 5, "bytes": 5 * 4 * 16 * 64}
    assert found["all-reduce"] == {"count": 1, "bytes": 4}


TPU = """HloModule jit_update
%cond (p: (s32[], bf16[8,4])) -> pred[] {
  %n = s32[]{:T(128)} constant(28)
  %p = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}
%dynamic (p.1: (s32[], s32[])) -> pred[] {
  %p.1 = (s32[], s32[]) parameter(0)
  %a = s32[] get-tuple-element(%p.1), index=0
  %b = s32[] get-tuple-element(%p.1), index=1
  ROOT %lt.1 = pred[] compare(%a, %b), direction=LT
}
%body (q: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %q = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[8,4]{1,0:T(8,128)(2,1)} get-tuple-element(%q), index=1
  %start = (bf16[8,4]{1,0:T(8,128)(2,1)}, bf16[32,4]{1,0:T(8,128)(2,1)}) all-gather-start(%x), dimensions={0}
  %done = bf16[32,4]{1,0:T(8,128)(2,1)} all-gather-done(%start)
  ROOT %t = (s32[], bf16[8,4]) tuple(%i.2, %x)
}
%inner (r: f32[32,4]) -> f32[8,4] {
  %r = f32[32,4]{1,0:T(8,128)} parameter(0)
  ROOT %rs = f32[8,4]{1,0:T(8,128)} reduce-scatter(%r), dimensions={0}, to_apply=%sum
}
%outer (u: (s32[], s32[])) -> (s32[], s32[]) {
  %u = (s32[], s32[]) parameter(0)
  %loop = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) while(%v), condition=%cond, body=%body
  %f = f32[8,4]{1,0:T(8,128)} fusion(%w), kind=kCustom, calls=%inner
  ROOT %o = (s32[], s32[]) tuple(%a.1, %b.1)
}
ENTRY %main (z: f32[4]) -> f32[] {
  %z = f32[4]{0:T(128)} parameter(0)
  %passes = (s32[], s32[]) while(%k), condition=%dynamic, body=%outer
  ROOT %ar = f32[]{:T(128)} all-reduce(%g), to_apply=%sum
}
"""


CONDITIONAL = """HloModule jit_update
%small (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  ROOT %p = f32[4]{0} collective-permute(%a), source_target_pairs={{0,1}}
}
%large (b: f32[4]) -> f32[4] {
  %b = f32[4]{0} parameter(0)
  %g = f32[32]{0} all-gather(%b), dimensions={0}
  ROOT %c = f32[4]{0} all-reduce(%b), to_apply=%sum
}
ENTRY %main (z: f32[4]) -> f32[4] {
  %z = f32[4]{0} parameter(0)
  %y = f32[4]{0} conditional(%i, %z, %z), BRANCHES
  ROOT %ar = f32[4]{0} all-reduce(%y), to_apply=%sum
}
"""


@pytest.mark.parametrize(
    "branches", ["branch_computations={%small, %large}", "true_computation=%large, false_computation=%small"]
)
def test_one_branch_of_a_condition_runs(branches: str) -> None:
    assert count_collectives(CONDITIONAL.replace("BRANCHES", branches)) == {
        "all-gather": {"count": 1, "bytes": 32 * 4},
        "all-reduce": {"count": 2, "bytes": 2 * 4 * 4},
    }


def test_transfers_in_the_text_of_a_tpu_program() -> None:
    assert count_collectives(TPU) == {
        "all-gather": {"count": 28, "bytes": 28 * 32 * 4 * 2},  # in the 28 layers of one pass
        "reduce-scatter": {"count": 1, "bytes": 32 * 4 * 4},
        "all-reduce": {"count": 1, "bytes": 4},
    }
