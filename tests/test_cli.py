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
from mistakes import MISTAKES

from opd_jax import __version__
from opd_jax.cli import main
from opd_jax.data.tasks import write_task_tokenizer
from opd_jax.models.decoder import DecoderConfig, init_params
from opd_jax.models.hf import save_model
from opd_jax.tracking.run_dir import read_rows
from opd_jax.training import setup

OPD = str(Path(sys.executable).with_name("opd"))
COMMANDS = ("demo", "train", "eval", "compare-results", "generate", "import", "export", "plan", "recipe", "report")
COMMANDS = (*COMMANDS, "analyze", "compare", "diagnose")


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


@pytest.mark.exhaustive
def test_sigterm_while_it_samples(opd: Any, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is finished and saved; a run that was never stopped has the same rows."""
    make = setup.make_rollout

    def make_and_stop(*args: Any, **settings: Any) -> Any:
        rollout = make(*args, **settings)

        def stopped(*inputs: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return rollout(*inputs)

        return stopped

    config = run_config(models, steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(setup, "make_rollout", make_and_stop)
        code, out, err = opd("train", config)
    assert (code, "stopped after step 1 of 3; continue with --resume" in err) == (3, True), out + err
    assert sorted(p.name for p in Path("run/checkpoints").iterdir()) == ["1"]
    assert opd("train", config, "--resume")[0] == 0
    assert opd("train", config, "run_dir=straight")[0] == 0
    stopped, straight = (read_rows(epath.Path(name) / "metrics.jsonl") for name in ("run", "straight"))
    assert [(r["step"], r["loss"], r["response_length"]) for r in stopped] == [
        (r["step"], r["loss"], r["response_length"]) for r in straight
    ]


def test_ctrl_c_asks_first_and_interrupts_then(opd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(out: Path, seed: int, resume: bool, stop: threading.Event) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        seen.append(stop.wait(5))
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("opd_jax.demo.run_demo", run)
    code, _, err = opd("demo")
    assert (code, seen, err) == (3, [True], "error: interrupted\n")
