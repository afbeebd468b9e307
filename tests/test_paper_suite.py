"""``opd paper``: what is done is kept, results of other settings are refused, and the page tells what was found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from test_paper_claims import BORNE_OUT, CONTRADICTED, seeds

from opd_jax.errors import InputError, Interrupted
from opd_jax.paper import suite, worker
from opd_jax.paper.presets import DOMAINS, PRESETS
from opd_jax.paper.suite import PLAN, run_experiments, tell
from opd_jax.paper.worker import result_path, settings

Row = dict[str, Any]
CURVES = ("gradient_norm", "loss")


def store(results: Path, domain: str, experiment: str, preset: str = "smoke", first: int = 1) -> None:
    """Three seeds of made-up results that bear the claim out."""
    results.mkdir(exist_ok=True)
    for seed, row in enumerate(seeds(BORNE_OUT[experiment]), first):
        head = {"experiment": experiment, "domain": domain, "seed": seed, "settings": settings(preset, domain)}
        text = json.dumps(head | row | {"cpu_seconds": {"shared": 60.0, f"{experiment}-{seed}": 60.0}})
        result_path(results, domain, experiment, seed).write_text(text)


@pytest.fixture
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("what is done was begun again")

    monkeypatch.setattr(suite, "_start", refuse)


@pytest.mark.usefixtures("no_workers")
def test_finished_experiments_are_not_done_again_and_the_page_tells_them(tmp_path: Path) -> None:
    results = tmp_path / "paper"
    for domain, experiments in PLAN.items():
        for experiment in experiments:
            store(results, domain, experiment, first=20)
    rows, failed = run_experiments("smoke", [20, 21, 22], [], tmp_path / "runs", results, 1)
    assert not failed
    found = tell(rows, results)
    assert len(found["claims"]) == 27
    assert {claim["verdict"] for claim in found["claims"]} == {"holds"}
    page = (tmp_path / "paper.md").read_text()
    for claim in found["claims"]:
        assert f"## Claim {claim['claim']} (§{claim['experiment']}) on {claim['domain']}: holds" in page
        for check in claim["checks"]:
            assert f"| {check['text']} | {check['mean']:+.3f} |" in page.replace("\\|", "|")
    shown = [part.partition(")")[0] for part in page.split("](paper/")[1:]]
    assert len(shown) == 23
    assert "52 training runs: 0.9 CPU hours" in page  # three seeds of seventeen experiments, and what they share
    assert all((results / name).stat().st_size > 10_000 for name in shown)


@pytest.mark.usefixtures("no_workers")
def test_only_some_experiments(tmp_path: Path) -> None:
    store(tmp_path / "r", "folds", "6.3")
    rows, _ = run_experiments("smoke", [1, 2, 3], ["6.3"], tmp_path / "runs", tmp_path / "r", 1)
    found = tell(rows, tmp_path / "r")
    assert [claim["experiment"] for claim in found["claims"]] == ["6.3"]


@pytest.mark.usefixtures("no_workers")
def test_a_claim_counts_seeds_that_had_not_been_seen_when_it_was_written(tmp_path: Path) -> None:
    for first in (14, 17):
        store(tmp_path / "r", "folds", "5.2", first=first)
        rows, _ = run_experiments("smoke", [first], ["5.2"], tmp_path / "runs", tmp_path / "r", 1)
        values = {claim["claim"]: len(claim["checks"][0]["values"]) for claim in tell(rows, tmp_path / "r")["claims"]}
        assert values == ({"7": 3} if first == 14 else {"7": 6, "7b": 3})
    page = (tmp_path / "r.md").read_text()
    assert page.count("Seeds from 17 on count: the others had been seen when it was written.") == 1


@pytest.mark.usefixtures("no_workers")
def test_seeds_done_before_count_too(tmp_path: Path) -> None:
    store(tmp_path / "r", "folds", "6.3")
    store(tmp_path / "r", "folds", "3.1")
    result_path(tmp_path / "r", "folds", "3.1", 1).unlink()
    rows, _ = run_experiments("smoke", [3], ["6.3"], tmp_path / "runs", tmp_path / "r", 1)
    found = tell(rows, tmp_path / "r")
    assert found["seeds"] == [1, 2, 3]
    assert [(claim["claim"], len(claim["checks"][0]["values"])) for claim in found["claims"]] == [("1", 2), ("10", 3)]


@pytest.mark.usefixtures("no_workers")
def test_reasons_stand_beside_what_did_not_hold(tmp_path: Path) -> None:
    (tmp_path / "reasons.yaml").write_text(
        'summary: all in all\n"2": a remark\n"3": it is too sure\n"3 products": not told\n'
    )
    for number, (experiment, results) in enumerate({"3.2": BORNE_OUT, "3.3": CONTRADICTED}.items(), 1):
        for seed, row in enumerate(seeds(results[experiment]), 1):
            head = {"experiment": experiment, "domain": "folds", "seed": seed, "settings": settings("smoke", "folds")}
            text = json.dumps(head | BORNE_OUT[experiment] | row | {"cpu_seconds": {str(number): 1.0}})
            result_path(tmp_path, "folds", experiment, seed).write_text(text)
    rows, _ = run_experiments("smoke", [1], ["3.3"], tmp_path / "o", tmp_path, 1)
    tell(rows, tmp_path)
    lines = tmp_path.with_suffix(".md").read_text().splitlines()
    assert {"all in all", "Remark: a remark"} <= set(lines)
    (told,) = [line for line in lines if line.startswith("- ")]
    assert told.startswith("- **Claim 3** (§3.3) on folds, does not: ")
    assert told.endswith("(does not). it is too sure")
    assert sum("it is too sure" in line for line in lines) == 1


def test_bad_input_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--only 6\.4: unknown experiment; expected some of 3\.1, 3\.2"):
        run_experiments("smoke", [1], ["6.4"], tmp_path / "o", tmp_path / "r", 1)
    store(tmp_path / "r", "folds", "6.3", preset="mini")
    with pytest.raises(InputError, match="made with other settings"):
        run_experiments("smoke", [1, 2, 3], ["6.3"], tmp_path / "o", tmp_path / "r", 1)
    broken = result_path(tmp_path / "r", "folds", "6.3", 1)
    for text in ('{"experiment": "6', '{"experiment": "6.3"}', "[]"):
        broken.write_text(text)
        with pytest.raises(InputError, match="no result"):
            run_experiments("smoke", [1], ["6.3"], tmp_path / "o", tmp_path / "r", 1)
    for text in ('"3": [', "- 3", '"31": why', '"3": 3'):
        (tmp_path / "s").mkdir(exist_ok=True)
        (tmp_path / "s" / "reasons.yaml").write_text(text)
        with pytest.raises(InputError, match=r"reasons\.yaml: (cannot be read as YAML|expected a text)"):
            run_experiments("smoke", [1], ["6.3"], tmp_path / "o", tmp_path / "s", 1)
    (tmp_path / "s" / "reasons.yaml").unlink()
    assert not (tmp_path / "o").exists()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--out .*file/o: cannot be made"):
        run_experiments("smoke", [1], ["3.1"], tmp_path / "file" / "o", tmp_path / "s", 1)


def test_a_signal_stops_the_workers_and_the_command_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def sleep(*_: Any) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        return started[-1]

    monkeypatch.setattr(suite, "_start", sleep)
    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted, match="0 of 2"):
        run_experiments("smoke", [1, 2], ["3.1"], tmp_path / "o", tmp_path / "r", 2, stop)
    assert [process.wait(10) for process in started] == [-15, -15]


def test_an_experiment_that_fails_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Any) -> Row:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(worker, "EXPERIMENTS", {"3.1": broken, "6.3": lambda _: {"models": {}}})
    failed = worker.work("smoke", "folds", 1, ["3.1", "6.3"], tmp_path, tmp_path)
    assert failed == ["3.1: ZeroDivisionError: by nothing"]
    assert [path.name for path in tmp_path.glob("*.json")] == ["folds-6.3-seed1.json"]


def test_a_worker_leaves_alone_what_another_is_at_or_has_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tmp_path, "folds", "3.2")
    monkeypatch.setattr(worker, "EXPERIMENTS", {"6.3": lambda _: {"models": {}}})
    with FileLock(tmp_path / "folds-3.1-seed1.lock"):
        assert not worker.work("smoke", "folds", 1, ["3.1", "3.2", "6.3"], tmp_path, tmp_path)
    assert not result_path(tmp_path, "folds", "3.1", 1).exists()
    assert result_path(tmp_path, "folds", "6.3", 1).exists()


def test_a_worker_without_a_seed_of_its_own_helps_from_the_other_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def start(given: Row, *_: Any) -> subprocess.Popen[bytes]:
        asked.append(given["experiments"])
        if len(asked) == 2:
            for name in given["experiments"]:
                store(tmp_path / "r", "folds", name)
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.2)"])

    monkeypatch.setattr(suite, "_start", start)
    rows, failed = run_experiments("smoke", [1], ["3.1", "3.3", "5.1"], tmp_path / "o", tmp_path / "r", 3)
    assert asked[:2] == [["3.1", "3.3", "5.1"], ["5.1", "3.3", "3.1"]]
    assert {row["experiment"] for row in rows} == {"3.1", "3.3", "5.1"}
    assert not failed


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("preset", PRESETS)
def test_texts_are_as_long_as_a_domain_says(domain: str, preset: str) -> None:
    from opd_jax.data.tasks import make_task

    d = DOMAINS[domain](PRESETS[preset])
    parts = [*d.corpus["mix"].values(), d.main, *d.variants.values()]
    longest = {"prompt": 0, "response": 0}
    for part in parts:
        for row in make_task(part["source"].removeprefix("task:"), "train", 50):
            words = {"prompt": part["template"].replace("{problem}", row["problem"]).replace("plain", row["problem"])}
            words["response"] = f"{row['response']} <eos>"
            longest = {name: max(longest[name], len(text.split())) for name, text in words.items()}
    assert longest == {"prompt": d.prompt, "response": d.response}
    main = make_task(d.main["source"].removeprefix("task:"), "train", 50)
    assert {len(row["response"].split()) + 1 for row in main} == {d.response}


@pytest.mark.long  # CI has `make smoke` for it, for it uses all cores
def test_smoke_runs_every_experiment(tmp_path: Path) -> None:
    command = ["paper", "--preset", "smoke", "--seeds", "1"]
    command += ["--out", str(tmp_path / "paper"), "--json", str(tmp_path / "paper.json")]
    code = "from opd_jax.cli import main; main()"
    # each run compiles an update of its own, and both workers the rollouts
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "jax"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, *command], env=os.environ | cache, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "paper.json").read_text())
    assert {claim["experiment"] for claim in found["claims"]} == set(PLAN["folds"])
    assert {claim["verdict"] for claim in found["claims"]} == {"undecided"}  # a single seed decides nothing
