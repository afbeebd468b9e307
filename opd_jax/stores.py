"""Object stores (gs://, s3://, az://, hf://): small files copied once, large ones read by byte ranges.

Requests go through fsspec, as those of etils.epath do. A failed request is repeated; what stays wrong is an InputError.
"""

from __future__ import annotations

import functools
import logging
import os
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import fsspec
import numpy as np
from etils import epath

from opd_jax.errors import InputError

DRIVERS = {"gs": "'opd-jax[gcs]'", "s3": "s3fs", "az": "adlfs", "hf": "huggingface_hub"}
SMALL = (".json", ".jinja", ".txt", ".model")  # what stands beside the weights of a model
WAITS = (0.5, 2.0, 8.0)  # seconds before the second, third and fourth attempt; gcsfs repeats by itself, too
CHUNK = 32 << 20  # bytes of one request
TOGETHER = 8  # requests at the same time: one stream does not fill the network of a TPU VM

T = TypeVar("T")

logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # a traceback for every request that is repeated


def is_remote(path: epath.PathLike) -> bool:
    return "://" in os.fspath(path)


def store_path(path: epath.PathLike) -> epath.Path:
    """A local path or one in a store.

    Raises:
        InputError: a scheme that is not known, or whose driver is not installed.
    """
    scheme, remote, _ = os.fspath(path).partition("://")
    if remote and scheme not in DRIVERS:
        known = ", ".join(f"{name}://" for name in DRIVERS)
        raise InputError(f"{path}: unknown kind of path; expected a local one or {known}")
    if remote:
        try:
            fsspec.get_filesystem_class(scheme)
        except ImportError as e:
            raise InputError(f"{path}: {scheme}:// paths need pip install {DRIVERS[scheme]}") from e
    return epath.Path(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """What orbax wants; ``epath.Path.absolute`` would put the working directory before gs://."""
    return store_path(path) if is_remote(path) else epath.Path(path).absolute()


def local_file(path: epath.PathLike) -> Path:
    """The file itself where it is local, else a copy that lasts as long as the process.

    Raises:
        InputError: it cannot be read.
    """
    return _copy(os.fspath(path), "file") if is_remote(path) else Path(path)


def local_directory(path: epath.PathLike) -> Path:
    """The directory itself where it is local, else a copy of its small files (configuration, tokenizer).

    Raises:
        InputError: it cannot be read.
    """
    return _copy(os.fspath(path), "directory") if is_remote(path) else Path(path)


def file_names(path: epath.PathLike) -> set[str]:
    """Names of what lies in a directory; none where there is no directory.

    Raises:
        InputError: the store refuses.
    """
    if not is_remote(path):
        return set(os.listdir(path)) if os.path.isdir(path) else set()
    store_path(path)
    fs, key = fsspec.core.url_to_fs(os.fspath(path))
    return {name.rpartition("/")[2] for name in attempt(os.fspath(path), lambda: fs.ls(key, detail=False))}


@functools.cache
def _copy(path: str, kind: str) -> Path:
    source = store_path(path)
    target = Path(_scratch().name) / f"{zlib.crc32(path.encode()):08x}-{source.name}"

    def download() -> None:
        fs, key = fsspec.core.url_to_fs(path)
        if kind == "file":
            fs.get_file(key, os.fspath(target))
            return
        target.mkdir(exist_ok=True)
        for info in fs.ls(key, detail=True):
            name = info["name"].rpartition("/")[2]
            if info["type"] == "file" and name.endswith(SMALL):
                fs.get_file(info["name"], os.fspath(target / name))

    attempt(path, download)
    return target


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="opd-jax-")  # removed when the process ends


def upload(source: Path, target: epath.Path) -> None:
    """Copies a local file into a store. Raises InputError where it cannot be written."""
    fs, key = fsspec.core.url_to_fs(os.fspath(target))
    attempt(os.fspath(target), lambda: fs.put_file(os.fspath(source), key))


class StoredFile:
    """A file that is read by byte ranges, each fetched by several requests at the same time."""

    def __init__(self, path: epath.PathLike):
        self.path = os.fspath(path)
        store_path(path)
        self._fs, self._key = fsspec.core.url_to_fs(self.path)
        self.size: int = attempt(self.path, lambda: self._fs.size(self._key))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Bytes ``start … stop`` as uint8. Raises InputError where they cannot be read."""
        out = np.empty(stop - start, np.uint8)
        for first in range(start, stop, CHUNK * TOGETHER):
            last = min(first + CHUNK * TOGETHER, stop)
            starts = list(range(first, last, CHUNK))
            stops = [*starts[1:], last]
            for a, b, data in zip(starts, stops, self._ranges(starts, stops), strict=True):
                out[a - start : b - start] = np.frombuffer(data, np.uint8)
        return out

    def _ranges(self, starts: list[int], stops: list[int]) -> list[bytes]:
        def fetch() -> list[bytes]:
            parts = self._fs.cat_ranges([self._key] * len(starts), starts, stops, on_error="raise")
            if [len(p) for p in parts] != [b - a for a, b in zip(starts, stops, strict=True)]:
                raise OSError("the store sent less than was asked for")
            return parts

        return attempt(self.path, fetch)


def attempt(path: str, call: Callable[[], T]) -> T:
    """The result of ``call``, repeated where it failed in a way that may pass."""
    for wait in (*WAITS, None):
        try:
            return call()
        except (FileNotFoundError, NotADirectoryError) as e:
            raise InputError(f"{path}: no such file or directory") from e
        except Exception as e:  # the libraries of the stores share no base class
            if wait is None or isinstance(e, PermissionError):
                reason = (str(e).strip() or type(e).__name__).splitlines()[0]
                raise InputError(
                    f"{path}: the store refuses ({reason}). Check the name, the network and your credentials (for "
                    "gs://: gcloud auth application-default login, or the service account of the machine)."
                ) from e
            time.sleep(wait)
    raise AssertionError
