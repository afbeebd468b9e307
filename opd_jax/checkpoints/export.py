"""From a run's checkpoint to a Hugging Face directory."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import orbax.checkpoint as ocp
import yaml
from etils import epath

from opd_jax.checkpoints.card import export_files
from opd_jax.checkpoints.state import best_of
from opd_jax.data.tokenizers import load_tokenizer, stop_ids
from opd_jax.errors import InputError
from opd_jax.models.decoder import DecoderConfig, abstract_params
from opd_jax.models.hf import check_target, load_config, save_model
from opd_jax.stores import absolute, is_remote, store_path
from opd_jax.tracking.run_dir import RunDir, existing_run, read_rows
from opd_jax.types import Params


def export_run(run_dir: epath.PathLike, out: epath.PathLike, dtype: str = "float32", best: bool = False) -> int:
    """Writes the student of a run's last (or best) checkpoint as a Hugging Face directory; returns its step.

    The tokenizer is that of ``student.path`` of the run; generation_config.json has the ids at which the run's
    responses end and its evaluation's sampling; README.md, a model card, how it was trained and its scores.

    Raises:
        InputError: no run, no checkpoint, a damaged one, or ``out`` exists; ``best`` of a run without checkpoint.best.
    """
    run = existing_run(store_path(run_dir))
    check_target(out)
    try:
        settings = yaml.safe_load(run.config.read_text())
        student, metric = settings["student"]["path"], settings.get("checkpoint", {}).get("best")
    except (yaml.YAMLError, KeyError, TypeError) as e:
        raise InputError(f"{run.config}: names no student.path; it is not the configuration of a run") from e
    config = load_config(student)
    # create=False: reading leaves the run as it is
    options = ocp.CheckpointManagerOptions(create=False, read_only=True)
    with ocp.CheckpointManager(absolute(run.checkpoints), options=options) as manager:
        steps = manager.all_steps() if run.checkpoints.exists() else []
        if not steps:
            raise InputError(f"{run.root}: no checkpoint yet; let the run reach its first one (checkpoint.every)")
        step = _best(run, metric, steps) if best else max(steps)
        # the weights alone, onto one device: the run may have had others, and the moments are twice as large
        like = {"params": abstract_params(config)}
        arguments = ocp.checkpoint_utils.construct_restore_args(like)
        state = ocp.args.PyTreeRestore(like, restore_args=arguments, partial_restore=True)
        try:
            restored = manager.restore(step, args=ocp.args.Composite(state=state))
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as e:  # orbax and tensorstore raise whatever they stumble over
            reason = (str(e.__cause__ or e).strip() or type(e).__name__).splitlines()[0][:200]
            raise InputError(
                f"{run.checkpoints}/{step}: cannot be read, or is not of {student} ({reason}). Where it is damaged, "
                "opd train --resume skips it; or move this directory away to export the checkpoint before."
            ) from e
    extra = export_files(run, step, stop_ids(student, load_tokenizer(student)))
    save_model(out, restored.state["params"], config, tokenizer_from=student, dtype=dtype, extra=extra)
    return step


def export_best(run: RunDir, params: Params, network: DecoderConfig, student: str, step: int) -> None:
    """Puts the student into ``run.best``, in place of the one before, as ``export_run`` would from its checkpoint.

    ``student``: directory with its tokenizer. All processes must call it; process 0 writes.

    Raises:
        InputError: a store refuses.
    """
    extra = {}
    if jax.process_index() == 0:
        if not is_remote(run.root):
            for half_written in Path(run.root).glob(f".{run.best.name}-*"):  # by one that was killed
                shutil.rmtree(half_written, ignore_errors=True)
        extra = export_files(run, step, stop_ids(student, load_tokenizer(student)))
    save_model(run.best, params, network, tokenizer_from=student, extra=extra, replace=True)


def _best(run: RunDir, metric: str | None, steps: Sequence[int]) -> int:
    if metric is None:
        raise InputError(
            f"{run.config}: checkpoint.best is not set, so no metric says which is best. Leave out --best."
        )
    step = best_of(read_rows(run.evaluations), metric, steps)
    if step is None:
        raise InputError(f"{run.root}: no checkpoint has been evaluated ({metric}) yet. Leave out --best.")
    return step
