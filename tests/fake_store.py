"""gs:// in memory: an fsspec file system that takes the place of gcsfs, counts what is read and fails on demand."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

from fsspec.implementations.memory import MemoryFileSystem


class FakeStore(MemoryFileSystem):
    protocol = ("gs", "gcs")
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    reads: ClassVar[list[tuple[str, int, int]]] = []  # path, start, stop of every range
    failures: ClassVar[list[Exception]] = []  # raised by the next requests, first to last
    written: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return MemoryFileSystem._strip_protocol(str(path).removeprefix("gs://").removeprefix("gcs://"))

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        if self.failures:
            raise self.failures.pop(0)
        self.reads.append((path, start, end))
        return super().cat_file(path, start, end, **kwargs)

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        if self.failures:
            raise self.failures.pop(0)
        self.written.append(rpath)
        super().put_file(lpath, rpath, **kwargs)

    @classmethod
    def bytes_read(cls, suffix: str) -> int:
        return sum(stop - start for path, start, stop in cls.reads if path.endswith(suffix))


def install(monkeypatch: Any) -> type[FakeStore]:
    """Empty, and in the registry for the time of a test."""
    from etils.epath import backend

    for name in FakeStore.protocol:
        monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, name, FakeStore)
    backend.fsspec_backend._get_filesystem.cache_clear()
    FakeStore.clear_instance_cache()
    for kept in (FakeStore.store, FakeStore.reads, FakeStore.failures, FakeStore.written):
        kept.clear()
    FakeStore.pseudo_dirs[:] = [""]
    return FakeStore


def upload(directory: Any, target: str) -> str:
    """Copies a local directory into the store; returns ``target``."""
    FakeStore().put(f"{directory}/", target, recursive=True)
    return target
