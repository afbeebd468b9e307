"""Checkpoints by orbax: asynchronous, atomic, restored onto whatever mesh the run now has."""

from __future__ import annotations

from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from opd_jax.errors import InputError
from opd_jax.stores import absolute


class Checkpoints:
    """The ``checkpoints/`` of a run: the train state and a JSON-able position (data iterator, counters) per step."""

    def __init__(self, directory: epath.PathLike, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(absolute(directory), options=options)

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position))
        self._manager.save(step, args=items)

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """The last whole checkpoint, sharded as the abstract ``like`` is; None where there is none yet.

        Raises:
            InputError: the checkpoint does not fit ``like`` (another model or optimizer).
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        items = ocp.args.Composite(state=ocp.args.StandardRestore(like), position=ocp.args.JsonRestore())
        try:
            restored: Any = self._manager.restore(step, args=items)
        except (ValueError, KeyError) as e:
            raise InputError(
                f"{self._manager.directory}/{step}: cannot be restored into this run ({str(e).splitlines()[0]}). "
                "It belongs to another model or optimizer; start a new run_dir."
            ) from e
        return restored.state, restored.position

    def last_whole(self) -> str:
        """For messages: the last checkpoint that could be restored now."""
        steps = ocp.utils.checkpoint_steps(self._manager.directory)
        return f"the last checkpoint is step {max(steps)}" if steps else "there is no checkpoint yet"

    def close(self) -> None:
        """Waits for pending writes."""
        self._manager.wait_until_finished()
        self._manager.close()


def abstract(state: Any, shardings: Any) -> Any:
    """Shapes, dtypes and shardings of a state, for ``Checkpoints.restore``."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
