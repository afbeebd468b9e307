"""From a run's checkpoint to a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

import orbax.checkpoint as ocp
import yaml
from etils import epath

from opd_jax.errors import InputError
from opd_jax.models.hf import check_target, load_config, save_model
from opd_jax.tracking.run_dir import existing_run


def export_run(run_dir: epath.PathLike, out: str | Path, dtype: str = "float32") -> int:
    """Writes the student of a run's last checkpoint as a Hugging Face directory; returns its step.

    The tokenizer and generation settings are those of ``student.path`` of the run.

    Raises:
        InputError: no run, no checkpoint, or ``out`` exists.
    """
    run = existing_run(run_dir)
    check_target(Path(out))
    student = yaml.safe_load(run.config.read_text())["student"]["path"]
    config = load_config(student)
    with ocp.CheckpointManager(run.checkpoints.absolute()) as manager:
        step = manager.latest_step()
        if step is None:
            raise InputError(f"{run.root}: no checkpoint yet; let the run reach its first one (checkpoint.every)")
        restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
    save_model(out, restored.state["params"], config, tokenizer_from=student, dtype=dtype)
    return step
