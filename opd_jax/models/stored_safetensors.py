"""safetensors in an object store: the header, then only the rows that are asked for.

The interface is that of ``safetensors.safe_open(...)``: ``keys``, ``get_slice(name)`` with ``get_shape``, ``get_dtype``
and slices. Format: 8 bytes length n (little-endian), n bytes JSON {name: {dtype, shape, data_offsets}}, the data.
"""

from __future__ import annotations

import json
import math
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from opd_jax.stores import StoredFile

LARGEST_HEADER = 100_000_000  # as the safetensors library has it
NUMPY = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
ITEM_BYTES = {
    **{name: 8 for name in ("F64", "I64", "U64", "C64")},
    **{name: 4 for name in ("F32", "I32", "U32")},
    **{name: 2 for name in ("F16", "BF16", "I16", "U16")},
    **{name: 1 for name in ("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0")},
}


class StoredSafetensors:
    """One safetensors file, opened by its header.

    Raises:
        ValueError: not a whole safetensors file; the message says what is wrong.
        InputError: it cannot be read.
    """

    def __init__(self, path: epath.PathLike):
        self.file = StoredFile(path)
        self.tensors, self.data_start = _read_header(self.file)
        self._last: tuple[Any, np.ndarray] | None = None

    def keys(self) -> list[str]:
        return list(self.tensors)

    def get_slice(self, name: str) -> StoredTensor:
        return StoredTensor(self, name)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows ``start … stop`` of a tensor. The last ones are kept: the next device may want other columns of them."""
        wanted = name, start, stop
        if self._last is None or self._last[0] != wanted:
            entry = self.tensors[name]
            dtype, shape = NUMPY[entry["dtype"]], entry["shape"]
            row_bytes = math.prod(shape[1:]) * dtype.itemsize
            first = self.data_start + entry["data_offsets"][0]
            data = self.file.read(first + start * row_bytes, first + stop * row_bytes)
            self._last = wanted, data.view(dtype).reshape(stop - start, *shape[1:])
        return self._last[1]


class StoredTensor:
    """A lazy tensor of at least one axis; indexing reads the rows of the leading slice and nothing else."""

    def __init__(self, parent: StoredSafetensors, name: str):
        self._parent, self._name = parent, name

    def get_shape(self) -> list[int]:
        return self._parent.tensors[self._name]["shape"]

    def get_dtype(self) -> str:
        return self._parent.tensors[self._name]["dtype"]

    def __getitem__(self, key: slice | tuple[slice, ...]) -> np.ndarray:
        leading, *rest = key if isinstance(key, tuple) else (key,)
        start, stop, _ = leading.indices(self.get_shape()[0])
        return self._parent.rows(self._name, start, stop)[(slice(None), *rest)]


def _read_header(file: StoredFile) -> tuple[dict[str, Any], int]:
    """Name → entry of every tensor, and where the data start."""
    if file.size < 8:
        raise ValueError(f"{file.size} bytes")
    begin = file.read(0, min(file.size, 1 << 16)).tobytes()
    length = int.from_bytes(begin[:8], "little")
    data_start = 8 + length
    if length > LARGEST_HEADER or data_start > file.size:
        raise ValueError(f"its header claims {length:,} bytes of {file.size:,}")
    if len(begin) < data_start:
        begin += file.read(len(begin), data_start).tobytes()
    try:
        header = json.loads(begin[8:data_start])
    except (ValueError, RecursionError) as e:
        raise ValueError(f"its header is not JSON: {e}") from e
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    header.pop("__metadata__", None)
    # contiguous and complete, as the library demands: no tensor can read another's bytes
    expected = 0
    for name, entry in sorted(header.items(), key=lambda item: _offsets(*item)):
        start, stop = _offsets(name, entry)
        size = math.prod(entry["shape"]) * ITEM_BYTES.get(entry["dtype"], 0)
        if start != expected or stop - start != size:
            raise ValueError(f"tensor '{name}' ({entry['dtype']} {entry['shape']}) lies at bytes {start} to {stop}")
        expected = stop
    if data_start + expected != file.size:
        raise ValueError(f"{file.size:,} bytes, though its header describes {data_start + expected:,}")
    return header, data_start


def _offsets(name: str, entry: Any) -> tuple[int, int]:
    """The byte range of an entry whose fields have the right types."""

    def counts(value: Any) -> bool:
        return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)

    if (
        not isinstance(entry, dict)
        or str(entry.get("dtype")) not in ITEM_BYTES
        or not counts(entry.get("shape"))
        or not counts(entry.get("data_offsets"))
        or len(entry["data_offsets"]) != 2
    ):
        raise ValueError(f"the entry of tensor '{name}' is malformed")
    return tuple(entry["data_offsets"])
