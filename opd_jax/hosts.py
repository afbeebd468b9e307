"""Several processes of one run, one a host: how they find each other, agree, and end when one of them is lost.

JAX ends a process whose peers are gone by ``abort()``, after a page of C++ stack; a failed start ends the same way.
Here the C++ messages are held back, read, and said in one line.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from opd_jax.errors import InputError

START_SECONDS = 300  # for all processes to come; a pod's hosts may start minutes apart
HEARTBEAT_SECONDS = 40  # without a sign of life; JAX finds a lost process in half of it to all of it
SHUTDOWN_SECONDS = 60  # one that ends waits as long for the others

_OPTIONS = {"coordinator": "OPD_COORDINATOR", "processes": "OPD_PROCESSES", "process_id": "OPD_PROCESS_ID"}
_MESSAGE_BYTES = 2000


def start(coordinator: str | None = None, processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the other processes of the run, if there are any; to be called before anything touches a device.

    The three arguments, or OPD_COORDINATOR (host:port of process 0), OPD_PROCESSES and OPD_PROCESS_ID, or what SLURM,
    Open MPI, GKE or a Cloud TPU VM say. On any other machine it does nothing.

    Raises:
        InputError: incomplete or contradictory arguments, a port in use, or processes that differ in their number.
            (Where the others do not come within START_SECONDS, the process ends with such a message, exit code 2.)
    """
    chosen = _explicit(coordinator, processes, process_id, os.environ)
    how = chosen or _cluster(os.environ)
    if how is None:
        return
    if how.get("process_id") == 0:
        _check_port(how["coordinator_address"])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM, which `agree` shares out
    native.listen(how)
    try:
        jax.distributed.initialize(
            **how,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (OSError, RuntimeError, ValueError) as e:
        if how == {"cluster_detection_method": "gcetpu"} and not jax.distributed.is_initialized():
            return  # chips without Google's metadata server: a machine by itself
        raise InputError(f"the processes of this run could not be joined ({e}). {_explained(how)}") from e
    native.started = jax.process_index(), jax.process_count()
    sys.excepthook = _end_at_once
    wanted = np.int32(how.get("num_processes", jax.process_count()))
    counts = np.unique(multihost_utils.process_allgather(wanted)).tolist() if several() else [int(wanted)]
    if counts != [jax.process_count()]:
        raise InputError(f"processes: given as {counts}, but {jax.process_count()} joined. Give all the same number.")


def several() -> bool:
    """Whether this run has more than one process."""
    return jax.process_count() > 1


def agree(flag: bool) -> bool:
    """True everywhere where it is True on any process; all must call it."""
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag)))) if several() else flag


def fetch(tree: Any) -> Any:
    """The whole arrays on every host, as NumPy: copied where this process holds them, gathered from all elsewhere."""

    def whole(x: Any) -> Any:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return x

    return jax.device_get(jax.tree.map(whole, tree))


def merge(values: np.ndarray) -> np.ndarray:
    """Float64 numbers that are NaN but where a process knows them: what any process knows, on all."""
    if not several():
        return values
    words = multihost_utils.process_allgather(np.ascontiguousarray(values).view(np.uint32))  # float64 would be rounded
    parts = np.ascontiguousarray(words).view(np.float64)
    known = np.isfinite(parts)
    first = np.take_along_axis(parts, np.argmax(known, axis=0)[None], axis=0)[0]
    return np.where(known.any(0), first, np.nan)


@contextlib.contextmanager
def refused_together() -> Iterator[None]:
    """An InputError of one process is raised by all, so that nobody waits for the one that has ended."""
    mine = None
    try:
        yield
    except InputError as e:
        if not several():
            raise
        mine = e
    if not several():
        return
    text = np.zeros(_MESSAGE_BYTES, np.uint8)
    data = str(mine or "").encode()[:_MESSAGE_BYTES]
    text[: len(data)] = np.frombuffer(data, np.uint8)
    texts = multihost_utils.process_allgather(text)
    if mine:
        raise mine
    for i, line in enumerate(texts):
        if line.any():
            raise InputError(f"process {i}: {line.tobytes().rstrip(bytes(1)).decode(errors='replace')}")


def check_same(what: str, content: str) -> None:
    """Raises InputError on all processes where one of them holds another ``content``; all must call it."""
    if not several():
        return
    sums = multihost_utils.process_allgather(np.uint32(zlib.crc32(content.encode("utf-8", "backslashreplace"))))
    if others := [str(i) for i, x in enumerate(sums) if x != sums[0]]:
        raise InputError(
            f"{what}: not the same on process {', '.join(others)} as on process 0. Give all the same files and options."
        )


@contextlib.contextmanager
def together() -> Iterator[None]:
    """If a process is lost inside, the others end with exit code 1 and one line that names it."""
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if several() and "RESOURCE_EXHAUSTED" not in str(e):
            # A collective fails as soon as a peer is gone; who it was is known when its heartbeats are missed, and
            # then this process is aborted.
            time.sleep(HEARTBEAT_SECONDS + 20)
        raise


def on_loss(progress: Callable[[], str]) -> None:
    """``progress()``, the last checkpoint in words, is then said too."""
    native.progress = progress


def _explicit(
    coordinator: str | None, processes: int | None, process_id: int | None, environment: Mapping[str, str]
) -> dict[str, Any] | None:
    given: dict[str, Any] = {"coordinator": coordinator, "processes": processes, "process_id": process_id}
    given = {name: environment.get(_OPTIONS[name]) if value is None else value for name, value in given.items()}
    missing = [f"--{name.replace('_', '-')} (or {_OPTIONS[name]})" for name in given if given[name] is None]
    if len(missing) == len(given):
        return None
    if missing:
        raise InputError(f"several processes: {' and '.join(missing)} not given. Give all three, or none of them.")
    try:
        count, index = int(given["processes"]), int(given["process_id"])
    except ValueError as e:
        raise InputError(f"several processes: OPD_PROCESSES and OPD_PROCESS_ID must be integers ({e}).") from e
    if not 0 <= index < count:
        raise InputError(
            f"--process-id {index} --processes {count}: there must be at least one process, and its index must be one "
            f"of 0 … {max(count, 1) - 1}."
        )
    host, _, port = given["coordinator"].rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise InputError(f"--coordinator {given['coordinator']}: expected host:port of process 0, as 10.0.0.2:8476.")
    return {"coordinator_address": given["coordinator"], "num_processes": count, "process_id": index}


def _cluster(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What ``jax.distributed.initialize`` is to be told where a scheduler started several processes."""
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if _number(environment, "SLURM_NTASKS") > 1 and all(name in environment for name in slurm):
        return {"cluster_detection_method": "slurm"} | _slurm_devices(environment)
    if _number(environment, "OMPI_COMM_WORLD_SIZE") > 1 and "OMPI_MCA_orte_hnp_uri" in environment:
        return {"cluster_detection_method": "ompi"}
    if not {"tpu", ""} & set(environment.get("JAX_PLATFORMS", "").split(",")):
        return None
    workers = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
    if workers is not None:
        many = "," in workers or _number(environment, "MEGASCALE_NUM_SLICES") > 1
        return {"cluster_detection_method": "gketpu"} if many else None
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    if chips and "TPU_SKIP_MDS_QUERY" not in environment and importlib.util.find_spec("libtpu"):
        return {"cluster_detection_method": "gcetpu"}
    return None


def _slurm_devices(environment: Mapping[str, str]) -> dict[str, Any]:
    """JAX gives a SLURM task the GPU of its local index; a task with a node, or a GPU, of its own uses all it sees."""
    visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    seen = len(visible) if visible != [""] else _number(environment, "SLURM_GPUS_ON_NODE")
    alone = _number(environment, "SLURM_NTASKS") == _number(environment, "SLURM_STEP_NUM_NODES")
    return {"local_device_ids": list(range(seen))} if seen == 1 or (seen and alone) else {}


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    return int(text) if text.isdigit() else 0


def _check_port(address: str) -> None:
    # JAX crashes on a port in use
    port = int(address.rpartition(":")[2])
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
    except OSError as e:
        reason = os.strerror(e.errno or 0)
        raise InputError(
            f"--coordinator {address}: process 0 cannot listen on port {port} ({reason}). Give a free port, the same "
            "to all processes."
        ) from e


def _explained(how: Mapping[str, Any]) -> str:
    """Why the others did not come, as far as it can be told from here."""
    if "coordinator_address" not in how:
        return f"Not all processes of {how['cluster_detection_method']} came within {START_SECONDS} s; start all again."
    address, count, index = how["coordinator_address"], how["num_processes"], how["process_id"]
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
    except OSError as e:
        if index:
            return (
                f"Process {index} of {count} got no answer from the coordinator at {address} ({e}). Start process 0 "
                f"there, mend --coordinator, let the port through; or it has given up on fewer than {count} processes."
            )
    return (
        f"Fewer than {count} processes came within {START_SECONDS} s, or two had the same --process-id. Start one for "
        f"each --process-id 0 … {count - 1}, or mend --processes."
    )


def _end_at_once(kind: Any, error: Any, trace: Any) -> None:
    """A process that failed must not wait for the others to end: they wait for it."""
    traceback.print_exception(kind, error, trace)
    sys.stderr.flush()
    os._exit(1)


class _Native:
    """File descriptor 2 goes through a pipe: messages about lost peers are held, all others are passed on."""

    _RECORD = re.compile(rb"[IWEF]\d{4} ")
    _OF_PEERS = re.compile(rb"[WEF]\d{4} .*(coordination_service|preemption_sync|add_port|client\.h)")

    def __init__(self) -> None:
        self.progress: Callable[[], str] | None = None
        self.started: tuple[int, int] | None = None
        self._how: Mapping[str, Any] = {}
        self._held: list[bytes] = []
        self._drained = threading.Event()

    def listen(self, how: Mapping[str, Any]) -> None:
        """To be called once. Python's own stdout and stderr stay as they are."""
        self._how = how
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, name in ((1, "stdout"), (2, "stderr")):
            setattr(sys, name, os.fdopen(os.dup(fd), "w", buffering=1, errors="backslashreplace"))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # gloo prints its ranks
        self._pipe, write = os.pipe()
        os.dup2(write, 2)
        threading.Thread(target=self._read, daemon=True).start()
        kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
        self._handler = kind(self._aborted)
        libc = ctypes.CDLL(None)
        libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, kind), ctypes.c_void_p
        libc.signal(signal.SIGABRT, self._handler)

    def _read(self) -> None:
        holding = False
        with os.fdopen(self._pipe, "rb", buffering=0) as pipe:  # a buffer would be locked when the interpreter ends
            for line in pipe:
                if line == b"\0\n":
                    self._drained.set()
                    continue
                if self._RECORD.match(line):
                    holding = bool(self._OF_PEERS.match(line))
                if holding:
                    self._held.append(line)
                else:
                    sys.stderr.write(line.decode(errors="replace"))
                    sys.stderr.flush()

    def _aborted(self, _: int) -> None:
        os.write(2, b"\0\n")
        self._drained.wait(5)
        text = b"".join(self._held).decode(errors="replace")
        message, code = self._verdict(text)
        if not message:
            sys.stderr.write(text)
            sys.stderr.flush()
            return  # abort() goes on
        sys.stderr.write(f"error: {message}\n")
        sys.stderr.flush()
        if (self.started[0] if self.started else self._how.get("process_id")) == 0:
            time.sleep(3)  # process 0 has told the others what is wrong; once it is gone, they would name it
        os._exit(code)

    def _verdict(self, text: str) -> tuple[str, int]:
        """(message, exit code); no message where the abort was not about other processes."""
        if "JAX distributed service detected fatal errors" not in text:
            return "", 1
        if self.started is None:
            return _explained(self._how), 2
        lost = re.search(r"stopped sending heartbeats\):\s*([\d,\s]+)", text)
        names = re.findall(r"\d+", lost[1]) if lost else ["0"] if "leader task" in text else []
        which = f"process {' and '.join(dict.fromkeys(names))}" if names else "a process"
        return f"{which} of {self.started[1]} was lost; {self._advice()}", 1

    def _advice(self) -> str:
        if self.progress is None:  # the run directory is not made yet
            return "start all processes again"
        found: list[str] = []
        look = threading.Thread(target=lambda say: found.append(say()), args=(self.progress,), daemon=True)
        look.start()
        look.join(10)  # the store may be what was lost
        return (f"{found[0]}; " if found else "") + "start all processes again with --resume"


native = _Native()
