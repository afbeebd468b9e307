"""How much of a step passes outside of jitted code: Python, transfers, logs.

    python benchmarks/overhead.py [--json benchmarks/results/overhead.json] [--steps 30]

The demo's run (``opd demo``: Llama of 0.4 M parameters, 64 prompts of 10 tokens, 22 new tokens, float32), with random
weights. A profile says when a program runs on any device; what remains of each step's time, from asking for prompts
to its row in the logs, is overhead. Nothing is as small as this: it is the worst case.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import jax
from etils import epath

from opd_jax.config_files import dump_config, parse_config
from opd_jax.data.tasks import write_task_tokenizer
from opd_jax.demo import TASK, distillation_config
from opd_jax.models.decoder import DecoderConfig, init_params
from opd_jax.models.hf import save_model
from opd_jax.tracking.console import Console
from opd_jax.tracking.run_dir import cpu_model, open_run
from opd_jax.tracking.writers import MetricWriter
from opd_jax.training.setup import prepare
from opd_jax.training.stages import rollout_step

WARM_UP = 5
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        steps, rows = run(Path(directory), options.steps)
    share = statistics.median(1 - busy / whole for whole, busy in steps)
    stages = {
        name.removeprefix("time/"): statistics.median(row[name] for row in rows)
        for name in rows[0]
        if name.startswith("time/")
    }
    whole = statistics.median(whole for whole, _ in steps)
    hardware = f"{os.cpu_count()} cores, {cpu_model()}; {jax.device_count()} × {jax.devices()[0].device_kind}"
    console = Console()
    console.table(
        f"{hardware}; jax {jax.__version__}",
        ["", "ms"],
        [["a step", 1e3 * whole], ["outside of jitted code", 1e3 * share * whole], ["share", f"{share:.1%}"]]
        + [[f"stage {name}", 1e3 * seconds] for name, seconds in stages.items()],
    )
    if options.json:
        result = {"hardware": hardware, "jax": jax.__version__, "steps": len(steps), "step_s": whole, "overhead": share}
        options.json.write_text(json.dumps(result | {"stages_s": stages}, indent=2) + "\n")


def run(path: Path, steps: int) -> tuple[list[tuple[float, float]], list[Row]]:
    """(seconds, of them in programs) of each step, and its row."""
    vocab = write_task_tokenizer(path / "tokenizer", TASK)
    network = DecoderConfig(
        "llama", vocab, width=128, hidden=384, layers=2, heads=4, kv_heads=4, head_dim=32, norm_eps=1e-6,
        rope_theta=1e4, max_positions=64, tie_embeddings=True,
    )  # fmt: skip
    for seed, name in enumerate(("student", "teacher")):
        params = init_params(network, jax.random.key(seed))
        save_model(path / name, params, network, tokenizer_from=path / "tokenizer")
    tree = distillation_config(path, 0).model_dump() | {"evaluation": {}}
    config = parse_config(tree)
    setup = prepare(config)
    state, rows = setup.state, []
    with MetricWriter(open_run(config.run_dir, dump_config(config), resume=False)) as writer:
        for step in range(1, WARM_UP + steps + 1):
            if step == WARM_UP + 1:
                traced = jax.profiler.ProfileOptions()
                traced.python_tracer_level = 0  # it would slow down what is to be measured
                jax.profiler.start_trace(path / "trace", profiler_options=traced)
            with jax.profiler.StepTraceAnnotation("step", step_num=step):
                state, row, _ = rollout_step(setup, state, step)
                writer.write(step, row)
            rows.append(row)
        jax.profiler.stop_trace()
    return programs_in_steps(epath.Path(path / "trace")), rows[WARM_UP:]


def programs_in_steps(trace: epath.Path) -> list[tuple[float, float]]:
    """(seconds of a step, seconds of it in which a program ran) from a trace."""
    (file,) = trace.glob("plugins/profile/*/*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    named = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    devices = {pid for pid, name in named.items() if name.startswith("/device:")}
    spans = [e for e in events if e.get("ph") == "X"]
    # without a device of its own, a program is what a thread of the host executes
    running = [e for e in spans if e["pid"] in devices or (not devices and e["name"] == "ThunkExecutor::Execute")]
    busy = sorted((e["ts"], e["ts"] + e["dur"]) for e in running)
    steps = sorted((e["ts"], e["ts"] + e["dur"]) for e in spans if e["name"] == "step" and e["pid"] not in devices)
    return [((end - start) / 1e6, covered(busy, start, end) / 1e6) for start, end in steps]


def covered(spans: list[tuple[float, float]], start: float, end: float) -> float:
    """Length of the union of ``spans``, which are in order, between ``start`` and ``end``."""
    total, at = 0.0, start
    for first, last in spans:
        first, last = max(first, at), min(last, end)
        if last > first:
            total, at = total + last - first, last
    return total


if __name__ == "__main__":
    main()
