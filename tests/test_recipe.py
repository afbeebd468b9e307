"""A recipe from end to end, stopped and killed between its stages and within them; nothing that is done is repeated."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_runs
import yaml
from test_cli import models, opd  # noqa: F401 (fixtures)

from opd_jax.config_files import dump_config, load_yaml
from opd_jax.data.sources import load_records
from opd_jax.errors import InputError, Interrupted
from opd_jax.models.hf import load_model
from opd_jax.recipe import Recipe, load_recipe, run_recipe

ROOT = Path(__file__).parents[1]
STEPS = 4
OUTS = ("out/rollouts.jsonl", "out/kept.jsonl", "out/sft/model", "out/opd/model")


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write_models(tmp_path_factory.mktemp("networks"))


def tree(networks: Path) -> dict[str, Any]:
    """Teacher's rollouts → filter → SFT, packed → OPD of what the SFT left; outputs below ./out."""
    data = {"source": f"task:{tiny_runs.TASK}", "chat": False, "max_prompt": 8, "limit": 48}
    generate = {"model": str(networks / "teacher"), "data": data, "out": OUTS[0], "max_response": 10}
    sampling = {"temperature": 1.5, "top_p": 0.95, "slots": 16, "dtype": "float32"}
    kept = {"source": OUTS[1], "response": "response", "chat": False, "max_prompt": 8}
    settings: dict[str, Any] = {"steps": STEPS, "checkpoint": {"every": 2}}
    sft = tiny_runs.run_config(networks, Path("out/sft"), "sft", data=kept, **settings)
    student = {"path": OUTS[2]}
    distil = tiny_runs.run_config(networks, Path("out/opd"), "opd", student=student, **settings)
    return {
        "stages": [
            {"generate": generate | sampling},
            {"filter": {"rollouts": OUTS[0], "out": OUTS[1], "keep_wrong": True, "max_repeated": 1.0}},
            {"train": yaml.safe_load(dump_config(sft))},
            {"train": yaml.safe_load(dump_config(distil))},
        ]
    }


def write(tree: dict[str, Any]) -> Path:
    path = Path("recipe.yaml")
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def whole(networks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a recipe that ran without interruption."""
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        results = run_recipe(load_recipe(write(tree(networks))))
    assert [row["was"] for row in results] == ["not begun"] * 4
    assert results[1]["result"]["kept"] > 8
    return root


@pytest.fixture
def begun(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that directory, times of files included, to work in."""
    shutil.copytree(whole, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def written(root: Path) -> dict[str, int]:
    """When each file was last written."""
    return {str(p.relative_to(root)): p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_student(a: Path, b: Path) -> None:
    ours, theirs = (load_model(root / OUTS[3])[0] for root in (a, b))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, ours, theirs)))


def test_each_stage_is_made_from_the_one_before(whole: Path, networks: Path) -> None:
    rollouts, kept = (lines(whole / out) for out in OUTS[:2])
    assert len(rollouts) == 48
    fit = {row["id"] for row in rollouts if row["finish_reason"] == "stop" and row["response"]}
    assert {row["id"] for row in kept} == fit
    for run, start in (("sft", networks / "student"), ("opd", whole / OUTS[2])):
        rows = lines(whole / "out" / run / "metrics.jsonl")
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        before, after = (load_model(path)[0] for path in (start, whole / "out" / run / "model"))
        assert tiny_runs.distance(after, before) > 1e-4


def test_what_is_done_is_not_repeated(begun: Path) -> None:
    before = written(begun)
    results = run_recipe(load_recipe("recipe.yaml"), resume=True)
    assert [row["was"] for row in results] == ["done"] * 4
    assert written(begun) == before


# After which output the kill came, and what it left of the next stages.
def _in_generate() -> None:
    file = Path(OUTS[0])
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])  # in the middle of a line
    for path in ("out/kept.jsonl", "out/kept.jsonl.meta.json"):
        Path(path).unlink()
    shutil.rmtree("out/sft")


def _in_filter() -> None:
    shutil.move(OUTS[1], "out/.kept.jsonl.tmp")
    shutil.rmtree("out/sft")


def _before_sft() -> None:
    shutil.rmtree("out/sft")


def _in_training(run: str) -> None:
    for path in (f"out/{run}/model", f"out/{run}/checkpoints/4"):
        shutil.rmtree(path)
    Path(f"out/{run}/summary.json").unlink()


def _before_export() -> None:
    shutil.rmtree("out/sft/model")


KILLS: dict[str, tuple[int, Callable[[], None]]] = {
    "in generate": (0, _in_generate),
    "in filter": (1, _in_filter),
    "before SFT": (2, _before_sft),
    "in SFT": (2, lambda: _in_training("sft")),
    "between SFT and its export": (2, _before_export),
    "in OPD": (3, lambda: _in_training("opd")),
}


@pytest.mark.parametrize(
    "kill",
    [pytest.param(name, marks=[] if name == "in OPD" else [pytest.mark.long]) for name in KILLS],
)
def test_a_kill_repeats_nothing_that_is_done(begun: Path, whole: Path, kill: str) -> None:
    done, leave = KILLS[kill]
    before = written(begun)
    if done < 3:
        shutil.rmtree("out/opd")
    leave()
    results = run_recipe(load_recipe("recipe.yaml"), resume=True)
    assert [row["was"] == "done" for row in results] == [i < done for i in range(4)]
    after = written(begun)
    finished = [path for path in before if any(path.startswith(out.removesuffix("/model")) for out in OUTS[:done])]
    assert {path: after[path] for path in finished} == {path: before[path] for path in finished}
    ids = [row["id"] for row in lines(begun / OUTS[0])]
    assert sorted(ids) == sorted(row["id"] for row in lines(whole / OUTS[0]))
    for run in ("sft", "opd"):
        assert [row["step"] for row in lines(Path("out") / run / "metrics.jsonl")] == [1, 2, 3, 4]
    if done:  # the lines that are made after a kill stand in another order
        assert_same_student(begun, whole)


class Later(threading.Event):
    """Set once it has been asked ``calls`` times."""

    def __init__(self, calls: int):
        super().__init__()
        self.calls = calls

    def is_set(self) -> bool:
        self.calls -= 1
        return self.calls < 0


@pytest.mark.long
def test_stopped_again_and_again(whole: Path, networks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at every third occasion; the student is the same bit by bit, each step was made once."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole / "out", "out", ignore=shutil.ignore_patterns("sft", "opd", "kept*"))
    recipe = load_recipe(write(tree(networks)))
    stops = 0
    while stops < 20:
        try:
            run_recipe(recipe, resume=True, stop=Later(3))
            break
        except Interrupted:
            stops += 1
    assert 2 <= stops < 20
    assert_same_student(tmp_path, whole)
    for run in ("sft", "opd"):
        assert [row["step"] for row in lines(Path("out") / run / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.long
def test_more_steps_for_the_last_stage(begun: Path, networks: Path) -> None:
    settings = tree(networks)
    settings["stages"][3]["train"]["steps"] = 6
    before = load_model(OUTS[3])[0]
    results = run_recipe(load_recipe(write(settings)), resume=True)
    assert [row["was"] for row in results] == ["done"] * 3 + ["begun"]
    assert [row["step"] for row in lines(Path("out/opd/metrics.jsonl"))] == [1, 2, 3, 4, 5, 6]
    assert tiny_runs.distance(load_model(OUTS[3])[0], before) > 1e-4


CHANGED: list[tuple[int, str, dict[str, Any], str]] = [
    (0, "generate", {"max_response": 9}, "max_response: it was begun with 10, now 9"),
    (0, "generate", {"problems": 7}, "problems: it was begun with None, now 7"),
    (0, "generate", {"model": "student"}, "model_fingerprint: it was begun with"),
    (1, "filter", {"keep_wrong": False}, "keep_wrong: it was begun with True, now False"),
    (2, "train", {"seed": 1}, "seed: the run has 0, now 1"),
    (3, "train", {"micro_batch": 4}, "micro_batch: the run has None, now 4"),
    (2, "train", {"steps": 5}, "stage 4 (out/opd/model) is done, but stage 3 (out/sft/model), which it is made from"),
]


@pytest.mark.parametrize(("stage", "kind", "change", "said"), CHANGED, ids=lambda x: None)
def test_changed_settings_of_what_is_done_are_refused(
    begun: Path, networks: Path, opd: Any, monkeypatch: Any, stage: int, kind: str, change: dict[str, Any], said: str  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.chdir(begun)
    settings = tree(networks)
    if "model" in change:
        change = {"model": str(networks / change["model"])}
    settings["stages"][stage][kind] |= change
    path = write(settings)
    before = written(begun)
    code, out, err = opd("recipe", path, "--resume")
    assert code == 2, out + err
    assert said in err
    assert written(begun) == before


def test_the_command(begun: Path, opd: Any, monkeypatch: Any) -> None:  # noqa: F811
    monkeypatch.chdir(begun)
    before = written(begun)
    code, out, err = opd("recipe", "recipe.yaml")
    assert code == 2
    assert "the recipe has begun. Go on with --resume" in err
    code, out, err = opd("recipe", "recipe.yaml", "--resume", "--json", "result.json")
    assert code == 0, out + err
    assert "4/4  train: out/opd/model: done before" in out
    assert [row["was"] for row in json.loads(Path("result.json").read_text())["stages"]] == ["done"] * 4
    Path("result.json").unlink()
    assert written(begun) == before


def test_what_a_filter_keeps_is_a_source(begun: Path) -> None:
    stage = load_recipe("recipe.yaml").stages[2].train
    assert stage
    records = load_records(stage.data)
    assert all(record.response and record.answer for record in records)
    assert len(records) == len(lines(begun / OUTS[1]))


BAD: list[tuple[str, str]] = [
    ("[]", "expected a mapping of settings, found list"),
    ("stages: []", "stages: List should have at least 1 item"),
    ("stages: [{}]", "stages.0: a stage is one of generate, filter, train"),
    ("stages: [{trian: {}}]", "stages.0.trian: unknown key; did you mean 'train'?"),
    ("stages: [{filter: {rollouts: a.jsonl, out: b.jsonl}}]", "stage 1 (filter): reads a.jsonl, which is not there"),
    ("stages: [{filter: {rollouts: a.jsonl, out: b}}]", "stages.0.filter.out: String should match pattern"),
    ("stages: [{filter: {rollouts: a.jsonl, out: b.jsonl, keepwrong: 1}}]", "did you mean 'keep_wrong'?"),
    ("stages: [{train: {run_dir: r, steps: x, student: {path: p}, data: {source: s}}}]", "stages.0.train.steps: "),
    (
        "stages: [{generate: {model: '{m}', data: {source: 'task:products-5x2'}, out: a.jsonl, top_p: 2}}]",
        "stages.0.generate.top_p: Input should be less than or equal to 1",
    ),
    (
        "stages: [{generate: {model: no, data: {source: 'task:products-5x2'}, out: a.jsonl}}]",
        "stage 1 (generate): reads no, which is not there, nor made by a stage before. Those make: nothing.",
    ),
    (
        "stages: [{generate: {model: '{m}', data: {source: 'task:products-5x2'}, out: a.jsonl}},"
        " {filter: {rollouts: b.jsonl, out: c.jsonl}}]",
        "stage 2 (filter): reads b.jsonl, which is not there, nor made by a stage before. Those make: a.jsonl.",
    ),
    (
        "stages: [{generate: {model: '{m}', data: {source: 'task:products-5x2'}, out: a.jsonl}},"
        " {filter: {rollouts: a.jsonl, out: a.jsonl}}]",
        "stage 2 (filter): writes a.jsonl, as a stage before does",
    ),
    (
        "stages: [{generate: {model: '{m}', data: {source: 'task:products-5x2'}, out: a.jsonl}},"
        " {train: {kind: sft, run_dir: r, steps: 2, student: {path: r/modle}, data: {source: a.jsonl, response: r}}}]",
        "stage 2 (train): reads r/modle, which is not there",
    ),
    (
        "stages: [{filter: {rollouts: a.jsonl, out: b.jsonl}, train: null}]",
        "stages.0: a stage is one of generate, filter, train",
    ),
]


@pytest.mark.parametrize(("text", "said"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_a_bad_recipe_is_one_message(opd: Any, tmp_path: Path, networks: Path, text: str, said: str) -> None:  # noqa: F811
    Path("bad.yaml").write_text(text.replace("{m}", str(networks / "teacher")))
    code, out, err = opd("recipe", "bad.yaml")
    assert code == 2, out + err
    assert said in err
    assert "Traceback" not in out + err
    assert [p.name for p in tmp_path.iterdir()] == ["bad.yaml"]


def test_a_file_that_no_recipe_made_is_not_overwritten(begun: Path, opd: Any, monkeypatch: Any) -> None:  # noqa: F811
    monkeypatch.chdir(begun)
    Path("out/kept.jsonl.meta.json").unlink()
    shutil.rmtree("out/sft")
    shutil.rmtree("out/opd")
    code, _, err = opd("recipe", "recipe.yaml", "--resume")
    assert code == 2
    assert "out/kept.jsonl: exists, and no recipe made it" in err


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_load(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the files are there that no stage makes."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="which is not there, nor made by a stage before"):
        load_recipe(path)
    sections = [stage.section for stage in load_yaml(path, Recipe).stages]
    for file in {file for section in sections for file in section.reads()} - {section.out for section in sections}:
        Path(file).mkdir(parents=True)
    assert [stage.kind for stage in load_recipe(path).stages] == ["generate", "filter", "train", "train"]
    head = path.read_text().partition("\nstages:")[0]
    assert "Hardware:" in head
    assert f"opd recipe configs/recipes/{path.name}" in head
