"""Checkpoints by orbax: asynchronous, atomic, verified when read, restored onto whatever mesh the run now has."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import math
import os
import sys
import threading
import weakref
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax import Array
from jax.experimental import multihost_utils

from opd_jax import hosts
from opd_jax.errors import InputError
from opd_jax.stores import absolute
from opd_jax.tracking.console import console

Row = dict[str, Any]

_NO_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
# Of errors while reading: these say nothing about what is stored.
_NOT_DAMAGE = (PermissionError, ConnectionError, TimeoutError)
_NOT_DAMAGE_CODES = ("PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")


# Orbax numbers its operations by process: of two runs in threads that save at once, each waits for ever for signals
# under the other's number.
_one_at_a_time = threading.Lock()
_managers: weakref.WeakSet[ocp.CheckpointManager] = weakref.WeakSet()


class Checkpoints:
    """The ``checkpoints/`` of a run: the train state and a JSON-able position (data iterator, counters) per step.

    The last ``keep`` are kept, and the best: the one whose evaluation has the best ``best``, a metric of
    evaluations.jsonl (see ``best_of``). ``evaluations``: the rows there are already, for a run that is resumed.

    Raises:
        InputError: the directory cannot be made.
    """

    def __init__(
        self, directory: epath.PathLike, keep: int, best: str | None = None, evaluations: Iterable[Row] = ()
    ) -> None:
        self._keep, self._best, self._evaluations = keep, best, list(evaluations)
        self._directory = absolute(directory)
        _ignore_late_reads()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self,  # pyright: ignore[reportArgumentType] (a protocol; its names are ours)
            cleanup_tmp_directories=True,  # what a kill left half-written
            create=True,
            enable_async_checkpointing=True,
        )
        with self._writing():
            self._manager = ocp.CheckpointManager(self._directory, options=options)
        self._pending: int | None = None
        _managers.add(self._manager)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax asks which checkpoints to keep; only process 0, which has the evaluations, deletes."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-self._keep :], best_of(self._evaluations, self._best, steps) if self._best else None}
        return [step in kept for step in steps]

    def save(self, step: int, state: Any, position: Row, evaluation: Row | None = None) -> None:
        """Begins to write a checkpoint, once the one before is whole. ``evaluation``: its row, if it was evaluated.

        Raises:
            InputError: this or the one before cannot be written; those that were whole remain.
        """
        self._wait()
        if evaluation is not None:
            self._evaluations.append(evaluation | {"step": step})
        saved: Row = {"position": position, "arrays": describe(state)}
        saved["crc"] = _crc(saved)
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(saved))
        self._pending = step
        with self._writing(), _one_at_a_time:
            self._manager.save(step, args=items, force=True)
            if len(_managers) > 1:
                self._manager.wait_until_finished()

    def best_is(self, step: int) -> bool:
        """Whether the evaluation of this step is the best so far; all processes must ask."""
        steps = {row["step"] for row in self._evaluations if 0 < row["step"] <= step}
        return hosts.agree(self._best is not None and best_of(self._evaluations, self._best, steps) == step)

    def check(self) -> None:
        """Raises what ``save`` raises as soon as it is known, so that no step is computed in vain."""
        if self._pending is not None and not self._manager.is_saving_in_progress():
            self._wait()

    def restore(self, like: Any) -> tuple[Any, Row] | None:
        """(state, position) of the last whole checkpoint, sharded as the abstract ``like``; None where there is none.

        Damaged ones are named on the console and moved to ``damaged-STEP``, so that the run can save these steps again.
        All processes must call it; what one of them cannot read, all skip.

        Raises:
            InputError: the last one belongs to another model or optimizer; all are damaged; one could not be read for
                a reason that may pass. Then nothing has been changed.
        """
        damaged: list[int] = []
        while (step := _of_first(max(set(self._manager.all_steps()) - {*damaged}, default=-1))) >= 0:
            found: Any = None
            with hosts.refused_together():
                found = self._read(step, like)
            broken = found if isinstance(found, str) else None
            if not hosts.agree(broken is not None):
                state, saved = cast(tuple[Any, Row], found)
                if describe(state) == saved["arrays"]:
                    self._set_aside(damaged)
                    return state, saved["position"]
                broken = "its arrays are not those that were saved"
                del state
            del found  # two states may not fit
            console.warn(f"{self._directory}/{step}: damaged ({broken or 'on another process'}); skipped")
            damaged.append(step)
        if damaged:
            raise InputError(
                f"{self._directory}: all checkpoints are damaged. Put a copy of one there; or delete this directory, "
                "and --resume begins again at step 0."
            )
        return None

    def last_whole(self) -> str:
        """For messages: the last checkpoint that could be restored now."""
        with contextlib.suppress(OSError):
            if steps := ocp.utils.checkpoint_steps(self._directory):
                return f"the last checkpoint is step {max(steps)}"
        return "there is no checkpoint yet"

    def close(self) -> None:
        """Waits for pending writes. Raises what ``save`` raises."""
        self._wait()
        self._manager.close()
        _managers.discard(self._manager)

    def _wait(self) -> None:
        with self._writing():
            self._manager.wait_until_finished()
        self._pending = None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with refused_writes(self._directory):
                yield
        except InputError as e:
            raise InputError(f"{e} Of those written before, {self.last_whole()}.") from e

    def _read(self, step: int, like: Any) -> Any:
        """By this process alone: (state, what else was saved), or what is damaged."""
        path = self._directory / str(step)
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(), active_processes={jax.process_index()}
        )
        try:
            saved = cast(Row, ocp.JsonCheckpointHandler().restore(path / "position"))
            if saved.pop("crc") != _crc(saved):
                return "position/metadata is not what was saved"
            wanted, given = saved["arrays"], {name: [str(x.dtype), list(x.shape)] for name, x in _named(like)}
            _check_fits(path, {name: [dtype, shape] for name, (dtype, shape, _) in wanted.items()}, given)
            handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
            state = handler.restore(path / "state", args=ocp.args.StandardRestore(like))
            return jax.block_until_ready(state), saved
        except (InputError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as e:  # orbax and tensorstore raise whatever they stumble over
            reason = (str(e.__cause__ or e).strip() or type(e).__name__).splitlines()[0][:200]
            causes = _causes(e)
            text = " ".join(map(str, causes))
            if any(isinstance(x, _NOT_DAMAGE) for x in causes) or any(code in text for code in _NOT_DAMAGE_CODES):
                raise InputError(f"{path}: cannot be read now ({reason}). Mend that, then use --resume again.") from e
            return reason

    def _set_aside(self, steps: list[int]) -> None:
        with hosts.refused_together():
            for step in steps if jax.process_index() == 0 else ():
                names = (f"damaged-{step}" + "'" * again for again in itertools.count())
                target = next(path for name in names if not (path := self._directory / name).exists())
                with self._writing():
                    (self._directory / str(step)).rename(target)
                console.warn(f"{self._directory}/{step}: moved to {target.name}")
        if steps:
            self._manager.reload()


def best_of(evaluations: Iterable[Row], metric: str, steps: Iterable[int]) -> int | None:
    """Of ``steps`` the one where the student's ``metric`` was best, the first of equals; None where none was measured.

    A divergence (kl in its name) is best where it is smallest, anything else where it is largest.
    """
    sign = -1 if "kl" in metric else 1
    values = {row["step"]: row.get(metric) for row in evaluations if row.get("who") == "student"}
    known = {step: sign * v for step in steps if (v := values.get(step)) is not None and math.isfinite(v)}
    return max(sorted(known), key=known.__getitem__, default=None)


def abstract(state: Any, shardings: Any) -> Any:
    """Shapes, dtypes and shardings of a state, for ``Checkpoints.restore``."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


@contextlib.contextmanager
def refused_writes(where: epath.PathLike) -> Iterator[None]:
    """A full disk or a directory that cannot be written, as an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as e:  # tensorstore's are ValueErrors
        for cause in _causes(e):
            for code in _NO_WRITING:
                if getattr(cause, "errno", None) == code or os.strerror(code) in str(cause):
                    raise InputError(
                        f"{os.fspath(where)}: cannot be written ({os.strerror(code)}). Free space, or make it "
                        "writable; then continue with --resume."
                    ) from e
        raise


def describe(state: Any) -> Row:
    """{name of an array: [dtype, shape, sum of its bits]}."""
    named = _named(state)
    sums = hosts.fetch(_bit_sums([x for _, x in named])).tolist()
    return {name: [str(x.dtype), list(x.shape), total] for (name, x), total in zip(named, sums, strict=True)}


def _crc(saved: Row) -> int:
    return zlib.crc32(json.dumps(saved, sort_keys=True).encode())


def _named(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]


@jax.jit
def _bit_sums(arrays: list[Array]) -> Array:
    """Each array's words added up, modulo 2³²: whatever the mesh, the same number."""

    def total(x: Array) -> Array:
        words = jax.lax.bitcast_convert_type(x, f"uint{8 * min(x.dtype.itemsize, 4)}")
        return jnp.sum(words, dtype=jnp.uint32)

    return jnp.stack([total(x) for x in arrays])


def _check_fits(path: epath.Path, saved: Row, wanted: Row) -> None:
    for name in sorted(saved.keys() | wanted.keys()):
        there, here = (" ".join(map(str, tree[name])) if name in tree else "absent" for tree in (saved, wanted))
        if there != here:
            raise InputError(
                f"{path}: belongs to another model or optimizer: {name} is {there} in the checkpoint, {here} in this "
                "run. Give the student.path and the optimizer that it was made with, or start in another run_dir."
            )


def _of_first(number: int) -> int:
    """Process 0's number, on all."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number))) if hosts.several() else number


def _causes(error: BaseException | None) -> list[BaseException]:
    """An exception, what it was raised from, and so on."""
    causes = []
    while error is not None:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes


def _ignore_late_reads() -> None:
    """Of several reads or writes one has failed: when the others end, orbax is gone, and Python would tell of each."""
    if getattr(sys.unraisablehook, "__module__", None) == __name__:
        return
    before = sys.unraisablehook

    def hook(found: Any) -> None:
        code = getattr(found.object, "cr_code", None)
        if str(found.exc_value) != "Event loop is closed" and "orbax" not in getattr(code, "co_filename", ""):
            before(found)

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())
