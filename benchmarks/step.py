"""A whole step of on-policy distillation, rollouts included, against TRL's ``DistillationTrainer``.

    pip install "trl==1.16.*" torch      # in another environment than the project's; without it TRL's row is left out
    python benchmarks/step.py [--json benchmarks/results/step.json] [--steps 8] [--profile DIRECTORY]

Llama of 19.5 M parameters (width 256, 4 layers, |V| 32,000, untied) as student and teacher, random weights, batch 8 in
one pass, prompts of 32 tokens, 64 new tokens, float32, AdamW. After each of TRL's steps each of ours runs once; seconds
are medians. TRL has the full reverse KL only; the sampled and top-16 objectives are held against the same. TRL's 1 and
2 threads are tried for five steps each, the better is timed. TRL computes no metrics, so ours are off
(``metrics_every``), except in the row that says so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd_jax.config_files import parse_config
from opd_jax.models.decoder import DecoderConfig, init_params
from opd_jax.models.hf import save_model
from opd_jax.tracking.console import Console
from opd_jax.tracking.run_dir import cpu_model
from opd_jax.training.setup import prepare
from opd_jax.training.stages import rollout_step

VOCAB, BATCH, PROMPT, LENGTH = 32_000, 8, 32, 64
LLAMA = DecoderConfig(
    "llama", VOCAB, width=256, hidden=688, layers=4, heads=4, kv_heads=4, head_dim=64, norm_eps=1e-6, rope_theta=1e4,
    max_positions=256,
)  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {"objective": {"name": "full"}},
    "top-16": {"objective": {"name": "topk", "k": 16}},
    "sampled": {"objective": {"name": "sampled"}},
    "full, with metrics": {"objective": {"name": "full"}, "metrics_every": 1},
}
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--profile", type=Path, help="write a jax.profiler trace of one full step here")
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as directory:
        path = write_models(Path(directory))
        ours = {name: OurStep(path, settings) for name, settings in VARIANTS.items()}
        first = {name: step() for name, step in ours.items()}
        if options.profile:
            with jax.profiler.trace(options.profile):
                ours["full"]()
        seconds: dict[str, list[float]] = {name: [] for name in ours}

        def ours_once() -> None:
            for name, step in ours.items():
                seconds[name].append(step())

        theirs, threads = against_trl(path, options.steps, ours_once, console)
        if theirs is None:
            for _ in range(options.steps):
                ours_once()
    tokens = BATCH * LENGTH
    rows: list[Row] = []
    if theirs is not None:
        rows.append({"step": f"TRL, full, {threads} threads", "s": theirs, "tok/s": tokens / theirs, "x TRL": 1.0})
    for name, values in seconds.items():
        s = statistics.median(values)
        row = {"step": name, "s": s, "tok/s": tokens / s, "x TRL": theirs / s if theirs else None}
        rows.append(row | {"compile s": first[name] - s} | {k: round(v, 3) for k, v in ours[name].stages().items()})
    names = list(dict.fromkeys(k for row in rows for k in row))
    console.table(f"{os.cpu_count()} cores, {cpu_model()}; jax {jax.__version__}", names,
                  [[row.get(n) for n in names] for row in rows])  # fmt: skip
    if options.json:
        hardware = {"hardware": f"{os.cpu_count()} cores, {cpu_model()}", "jax": jax.__version__}
        options.json.write_text(json.dumps(hardware | {"rows": rows}, indent=2) + "\n")


class OurStep:
    """One step of a run, as ``opd train`` makes it; a call returns its seconds."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        tree: dict[str, Any] = {
            "run_dir": str(path / "unused"),
            "steps": 1000,
            "student": {"path": str(path / "model")},
            "teacher": {"path": str(path / "model")},
            "data": {"source": str(path / "prompts.jsonl"), "chat": False, "max_prompt": PROMPT},
            "rollout": {"prompts": BATCH, "samples": 1, "max_response": LENGTH},
            "dtype": "float32",
            "remat": "none",
            "micro_batch": BATCH,
            "metrics_every": 10_000,
        }
        self.setup = prepare(parse_config(tree | settings))
        self.state, self.step, self.rows = self.setup.state, 1, []

    def __call__(self) -> float:
        start = time.perf_counter()
        self.step += 1  # the first logged step of a run is always measured
        self.state, row, _ = rollout_step(self.setup, self.state, self.step)
        self.rows.append(row)
        return time.perf_counter() - start

    def stages(self) -> dict[str, float]:
        names = [n for n in self.rows[-1] if n.startswith("time/")]
        return {n.removeprefix("time/"): statistics.median(r[n] for r in self.rows[1:]) for n in names}


def write_models(path: Path) -> Path:
    words = {f"w{i}": i for i in range(VOCAB - 1)} | {"</s>": VOCAB - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")
    fast.save_pretrained(path / "tokenizer")
    save_model(path / "model", init_params(LLAMA, jax.random.key(0)), LLAMA, tokenizer_from=path / "tokenizer")
    rng = np.random.default_rng(0)
    problems = [" ".join(f"w{i}" for i in rng.integers(0, VOCAB - 1, PROMPT)) for _ in range(256)]
    (path / "prompts.jsonl").write_text("".join(json.dumps({"problem": p}) + "\n" for p in problems))
    return path


def against_trl(path: Path, steps: int, between: Callable[[], None], console: Console) -> tuple[float | None, int]:
    """Median seconds of TRL's step and its number of threads; ``between`` runs after each timed step."""
    try:
        import torch
        from trl.trainer.distillation_trainer import DistillationTrainer  # noqa: F401
    except ImportError as error:
        console.print(f'TRL is left out ({error}). To compare: pip install "trl==1.16.*" torch')
        return None, 0
    tried = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        tried[threads] = statistics.median(trl_steps(path, 6, lambda: None)[1:])
    best = min(tried, key=tried.__getitem__)
    torch.set_num_threads(best)
    return statistics.median(trl_steps(path, steps + 1, between)[1:]), best


def trl_steps(path: Path, steps: int, between: Callable[[], None]) -> list[float]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl.trainer.distillation_config import DistillationConfig
    from trl.trainer.distillation_trainer import DistillationTrainer

    seconds: list[float] = []

    class Timer(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.start)
            between()

    problems = [json.loads(line)["problem"] for line in (path / "prompts.jsonl").read_text().splitlines()]
    student, teacher = (AutoModelForCausalLM.from_pretrained(path / "model", dtype=torch.float32) for _ in range(2))
    settings = DistillationConfig(
        str(path / "trl"),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        max_completion_length=LENGTH,
        generation_kwargs={"min_new_tokens": LENGTH},
        beta=1.0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        learning_rate=1e-6,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path / "tokenizer")
    trainer = DistillationTrainer(
        student, teacher, settings, Dataset.from_dict({"prompt": problems}), processing_class=tokenizer,
        callbacks=[Timer()],
    )  # fmt: skip
    trainer.train()
    return seconds


if __name__ == "__main__":
    main()
