"""Exported students: what transformers makes of them, the model card as the Hub reads it, uploads to a stand-in."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import small_models
import transformers
from huggingface_hub import ModelCard

from opd_jax.checkpoints.card import base_model
from opd_jax.checkpoints.export import export_run
from opd_jax.checkpoints.hub import check_push, push_model
from opd_jax.config_files import dump_config, parse_config
from opd_jax.data.tasks import write_task_tokenizer
from opd_jax.errors import InputError
from opd_jax.models.decoder import forward, head, unembed
from opd_jax.models.hf import load_model
from opd_jax.tracking.run_dir import open_run
from opd_jax.tracking.writers import MetricWriter
from opd_jax.types import Params

CHAT = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
EVALUATION: dict[str, Any] = {
    "data": {"source": "some/problems", "split": "test"}, "samples": 4, "temperature": 0.6, "top_p": 0.95,
    "max_response": 30,
}  # fmt: skip


def make_run(tmp_path: Path, model: str = "qwen3", kind: str = "opd", **settings: Any) -> tuple[Path, Params]:
    """A run directory with one checkpoint, after step 7 of 10, and its weights."""
    student = small_models.write(model, tmp_path / "models" / "student")
    write_task_tokenizer(tmp_path / "tokenizer", "products-5x2")
    for file in (tmp_path / "tokenizer").iterdir():
        shutil.copy(file, student)
    (student / "chat_template.jinja").write_text(CHAT)
    (student / "generation_config.json").write_text('{"eos_token_id": 5, "temperature": 2.0, "max_length": 9}')
    data = {"source": str(tmp_path / "secret" / "prompts.jsonl")} | ({"response": "r"} if kind == "sft" else {})
    tree: dict[str, Any] = {"kind": kind, "run_dir": str(tmp_path / "run"), "steps": 10, "data": data}
    tree |= {"student": {"path": str(student)}, "evaluation": EVALUATION}
    if kind == "opd":
        tree["teacher"] = {"path": "/cache/models--big--teacher/snapshots/abc"}
    run = open_run(tmp_path / "run", dump_config(parse_config(tree | settings)), resume=False)
    params, _ = load_model(student)
    trained = jax.tree.map(lambda w: w * 0.98, params)
    with ocp.CheckpointManager(tmp_path / "run" / "checkpoints") as manager:
        manager.save(7, args=ocp.args.Composite(state=ocp.args.StandardSave({"params": trained, "step": np.int32(7)})))
    return run.root, trained  # pyright: ignore[reportReturnType]


def write_evaluations(tmp_path: Path) -> None:
    with MetricWriter(open_run(tmp_path / "run", (tmp_path / "run" / "config.yaml").read_text(), resume=True)) as log:
        log.write_evaluation(0, {"who": "teacher", "accuracy": 0.9, "accuracy_se": 0.01, "problems": 64, "samples": 4})
        for step, accuracy in ((0, 0.1), (7, 0.7), (10, 0.99)):
            row = {"accuracy": accuracy, "accuracy_se": 0.02, "reverse_kl": 0.5, "problems": 64, "samples": 4}
            log.write_evaluation(step, {"who": "student", **row})


@pytest.mark.torch
@pytest.mark.parametrize("model", ["llama3_rope", "qwen2_tied", "qwen3"])
def test_transformers_loads_it(model: str, tmp_path: Path) -> None:
    """Logits of transformers (torch) from the files against ours from the checkpoint; tokenizer and chat template."""
    torch = pytest.importorskip("torch")
    run, trained = make_run(tmp_path, model)
    assert export_run(run, tmp_path / "out") == 7
    oracle: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    ).eval()
    tokens = np.random.default_rng(0).integers(0, small_models.VOCAB, (2, 48))
    inputs: Any = tokens, np.broadcast_to(np.arange(48), (2, 48)), np.ones((2, 48), np.int32)
    _, config = load_model(tmp_path / "out")
    got = unembed(forward(trained, config, *inputs), head(trained))
    with torch.no_grad():
        expected = oracle(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    assert np.abs(expected).max() > 1
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "3"}], tokenize=False) == "<3>"
    ended = oracle.generate(torch.tensor(tokens[:1]), max_new_tokens=200, pad_token_id=0)[0, 48:].tolist()
    assert len(ended) == 200 or ended[-1] in (1, 5)


def test_generation_settings(tmp_path: Path) -> None:
    """Both ids at which the run's responses end, and the evaluation's sampling, whatever the student had."""
    run, _ = make_run(tmp_path)
    export_run(run, tmp_path / "out")
    settings: Any = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (settings.eos_token_id, settings.do_sample, settings.max_new_tokens) == ([1, 5], True, 30)
    assert (settings.temperature, settings.top_p, settings.top_k) == (0.6, 0.95, 0)
    greedy = tmp_path / "greedy"
    run, _ = make_run(greedy, evaluation=EVALUATION | {"temperature": 0.0, "max_response": None})
    export_run(run, greedy / "out")
    written = json.loads((greedy / "out" / "generation_config.json").read_text())
    assert written == {"eos_token_id": [1, 5], "do_sample": False, "max_new_tokens": 7168}


def test_card_of_a_distillation(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, objective={"name": "topk", "k": 16}, data={"source": "some/prompts"})
    write_evaluations(tmp_path)
    (tmp_path / "models" / "student" / "opd_import.json").write_text('{"source": "org/base", "from_hub": true}')
    export_run(run, tmp_path / "out")
    card: Any = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "org/base"
    assert card.data.library_name == "transformers"
    assert card.data.datasets == ["some/prompts"]
    assert {"opd-jax", "on-policy-distillation"} <= set(card.data.tags)
    text = card.text
    assert "`org/base` distilled from `big/teacher`" in text
    assert "| accuracy | 0.100 ± 0.020 | 0.700 ± 0.020 | 0.900 ± 0.010 |" in text
    assert "| gap recovery rate | – | 0.750" in text
    assert "0.99" not in text.split("## Training")[0]  # later than the checkpoint
    assert "64 problems of `some/problems` (test), 4 samples each, temperature 0.6, top-p 0.95" in text
    for line in ("topk: reverse KL over the student's top 16", "| steps | 7 of 10 |", "AdamW, rate 1e-06 (constant"):
        assert line in text
    assert f"| hardware | {jax.device_count()} × " in text
    # a student that was exported here hands the name of its base on
    assert base_model(str(tmp_path / "out")) == "org/base"


def test_card_tells_no_path_of_this_machine(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, kind="sft")
    export_run(run, tmp_path / "out")
    card: Any = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model is None
    assert "sft" in card.data.tags
    assert "`student` fine-tuned on `prompts.jsonl`" in card.text
    assert "## Scores" not in card.text
    assert str(tmp_path) not in card.content
    assert "secret" not in card.content


def test_card_of_a_mixture_and_a_reward(tmp_path: Path) -> None:
    mix = {"a": {"source": "some/problems"}, "b": {"source": str(tmp_path / "secret" / "b.jsonl"), "weight": 2.0}}
    settings: dict[str, Any] = {"data": {"mix": mix}, "teacher": None, "reward": {"terms": {"answer": 1.0}}}
    run, _ = make_run(tmp_path, kind="grpo", **settings)
    export_run(run, tmp_path / "out")
    card: Any = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.datasets == ["some/problems"]
    assert "grpo" in card.data.tags
    assert "(GRPO, opd-jax) on `some/problems` and `b.jsonl`, after 7 steps" in card.text
    assert "| objective | policy gradient of the reward 1 × answer |" in card.text
    assert "secret" not in card.content


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub's HTTP interface that an upload of small files needs; keeps what it is sent."""

    server: Any

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))
        if self.path.endswith("/create"):
            answer: Any = {"url": f"{self.server.url}/me/student"}
        elif "/preupload/" in self.path:
            answer = {
                "files": [f | {"uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            }
        else:
            answer = {"commitOid": "f00", "commitUrl": f"{self.server.url}/me/student/commit/f00", "success": True}
        self.answer(200, answer)

    def do_GET(self) -> None:
        self.answer(200, {"sha": "f00", "id": "me/student"})

    def answer(self, code: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        return


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    server.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_push(hub: Any, tmp_path: Path) -> None:
    """Every byte of the directory arrives in one commit of a private repository, by a real client over real HTTP."""
    run, _ = make_run(tmp_path)
    export_run(run, tmp_path / "out")
    assert push_model(tmp_path / "out", "me/student", private=True) == f"{hub.url}/me/student/commit/f00"
    made = json.loads(next(body for path, _, body in hub.seen if path.endswith("/create")))
    assert (made["name"], made["visibility"]) == ("student", "private")
    assert {token for _, token, _ in hub.seen} == {"Bearer hf_secret"}
    (commit,) = [body for path, _, body in hub.seen if "/commit/" in path]
    operations = [json.loads(line) for line in commit.splitlines()]
    files = {o["value"]["path"]: base64.b64decode(o["value"]["content"]) for o in operations if o["key"] == "file"}
    assert files == {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}


def test_a_push_that_fails_keeps_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = make_run(tmp_path)
    export_run(run, tmp_path / "out")
    before = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(InputError, match=r"whole in .*out\. .*hf upload me/student"):  # offline, as in all tests
        push_model(tmp_path / "out", "me/student")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    with pytest.raises(InputError, match="hf auth login"):
        push_model(tmp_path / "out", "me/student")
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == before


def test_what_cannot_be_pushed_is_refused_first() -> None:
    with pytest.raises(InputError, match=r"--push a/b/c: not a repository's name"):
        check_push("a/b/c", False, "out")
    with pytest.raises(InputError, match=r"--private: .*--push USER/NAME"):
        check_push(None, True, "out")
    with pytest.raises(InputError, match="uploads a local directory"):
        check_push("me/student", False, "gs://bucket/out")
    check_push("me/student", True, "out")
    check_push(None, False, "gs://bucket/out")
