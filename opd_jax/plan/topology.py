"""Topologies by their names on Cloud, their devices for ahead-of-time compilation, and what a chip can do."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import os
from typing import Any

import jax
from jax.experimental import topologies

from opd_jax.errors import InputError
from opd_jax.models.flops import PEAKS

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peak rates of one chip; ``link`` is one ring over the chips: both directions of one axis."""

    flops: float  # bfloat16, 1/s
    memory: float  # byte/s
    link: float  # byte/s


# cloud.google.com/tpu/docs (system architecture): HBM bandwidth. Links: 45 GB/s a direction on v4 and
# v5e, 90 GB/s on v5p and v6e (jax-ml.github.io/scaling-book). nvidia.com data sheets, dense; links by NVLink.
CHIPS = {
    "v4": Chip(PEAKS["v4"], 1.23e12, 90e9),
    "v5e": Chip(PEAKS["v5e"], 0.82e12, 90e9),
    "v5p": Chip(PEAKS["v5p"], 2.765e12, 180e9),
    "v6e": Chip(PEAKS["v6e"], 1.64e12, 180e9),
    "A100": Chip(PEAKS["A100"], 2.0e12, 300e9),
    "H100": Chip(PEAKS["H100"], 3.35e12, 450e9),
    "H200": Chip(PEAKS["H200"], 4.8e12, 450e9),
}
# What a program may use of 32, 16, 95 and 32 GiB, as the compiler's out-of-memory message says (libtpu 0.0.42).
USABLE = {"v4": 30.75 * GIB, "v5e": 15.75 * GIB, "v5p": 95.74 * GIB, "v6e": 31.25 * GIB}

_2D = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_3D = {
    8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8", 1024: "8x8x8",
    2048: "8x8x16", 4096: "8x16x16",
}  # fmt: skip
# Names of v4 and v5p count cores, two a chip; those of v5e and v6e count chips.
SHAPES = {f"{kind}-{n}": shape for kind in ("v5e", "v6e") for n, shape in _2D.items()} | {
    f"{kind}-{n}": shape for kind in ("v4", "v5p") for n, shape in _3D.items()
}


@dataclasses.dataclass(frozen=True)
class Topology:
    name: str
    devices: list[Any]
    usable: int  # bytes of memory a chip
    chip: Chip | None  # None: no published rates


def find_topology(name: str) -> Topology:
    """The devices of ``v5e-16`` and the like, of ``cpu-N`` (simulated) or of ``cuda`` (those present).

    Raises:
        InputError: an unknown name, libtpu missing, no GPU, or more CPU devices than the process has.
    """
    if name == "cuda":
        return _cuda()
    kind, _, count = name.partition("-")
    if kind == "cpu" and count.isdigit() and int(count) > 0:
        return _cpu(name, int(count))
    if name in SHAPES:
        return _tpu(name, kind)
    near = difflib.get_close_matches(name, [*SHAPES, "cpu-8", "cuda"], n=1, cutoff=0.0)[0]
    names = {kind: ", ".join(str(n) for n in sizes) for kind, sizes in (("v5e and v6e", _2D), ("v4 and v5p", _3D))}
    raise InputError(
        f"--topology {name}: unknown; did you mean {near}? Expected v5e-N or v6e-N with N (chips) one of "
        f"{names['v5e and v6e']}; v4-N or v5p-N with N (cores, two a chip) one of {names['v4 and v5p']}; "
        "cpu-N for N simulated devices; or cuda for the GPUs of this machine."
    )


def _tpu(name: str, kind: str) -> Topology:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"--topology {name}: the TPU compiler (libtpu) is not installed. Run: pip install 'opd-jax[aot]'"
        )
    _only_cpu()
    quiet = {
        "TPU_SKIP_MDS_QUERY": "1",  # no Cloud machine to ask what it is
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": name,
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it compiles only: no chip that two processes could fight for
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    for key, value in quiet.items():
        os.environ.setdefault(key, value)
    megacore = (
        {"chip_config_name": "megacore"} if kind == "v4" else {}
    )  # both cores of a chip as one device, as in jobs
    try:
        found = topologies.get_topology_desc(f"{kind}:{SHAPES[name]}", platform="tpu", **megacore)
    except RuntimeError as e:
        raise InputError(
            f"--topology {name}: the installed libtpu does not know {kind}:{SHAPES[name]} "
            f"({str(e).splitlines()[0]}). Update it: pip install -U 'opd-jax[aot]'"
        ) from e
    return Topology(name, list(found.devices), int(USABLE[kind]), CHIPS[kind])


def _cpu(name: str, count: int) -> Topology:
    _only_cpu()
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # the backend runs already
        if len(jax.devices("cpu")) < count:
            raise InputError(f"--topology {name}: this process has {len(jax.devices('cpu'))} CPU devices.") from None
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Topology(name, jax.devices("cpu")[:count], memory // count, None)


def _cuda() -> Topology:
    try:
        devices = jax.devices("cuda")
    except RuntimeError as e:
        raise InputError(
            "--topology cuda: no NVIDIA GPU that JAX can use here. Install opd-jax[cuda] on a machine with a GPU, "
            "or plan for a TPU (v5e-16) or for simulated devices (cpu-8)."
        ) from e
    kind = devices[0].device_kind
    chip = next((chip for name, chip in CHIPS.items() if name in kind), None)
    return Topology("cuda", devices, (devices[0].memory_stats() or {}).get("bytes_limit", 0), chip)


def _only_cpu() -> None:
    """On a machine with an accelerator, none of its memory is taken."""
    jax.config.update("jax_platforms", "cpu")
