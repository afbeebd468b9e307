"""A teacher's hidden states of texts that do not change, kept on disk: each text is scored once, not every epoch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from opd_jax.checkpoints.state import describe, refused_writes
from opd_jax.types import Params, Rollouts, Sequences


class ScoreCache:
    """Files ``directory/KEY.npy``, one a text: [tokens of the response, E] hidden states, in the teacher's dtype.

    The key holds the teacher's weights, prompt and response, so a cache may serve several runs.
    """

    def __init__(self, directory: str, params: Params, dtype: Any):
        self._directory, self._dtype = Path(directory), jnp.dtype(dtype)
        self._words = np.dtype(f"uint{8 * self._dtype.itemsize}")  # .npy knows no bfloat16
        with refused_writes(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
        self._teacher = json.dumps(describe(params), sort_keys=True).encode()

    def keys(self, rollouts: Rollouts) -> list[str | None]:
        """Of each sequence its key; None: it was sampled, and does not come again."""
        P = rollouts.prompts.tokens.shape[1]

        def key(i: int) -> str:
            prompt = rollouts.prompts.tokens[i, P - rollouts.prompts.lengths[i] :]
            parts = (self._teacher, np.asarray(prompt, np.int32), np.asarray(rollouts.tokens[i, : rollouts.lengths[i]]))
            digest = hashlib.sha256()
            for part in parts:
                data = part if isinstance(part, bytes) else part.astype(np.int32).tobytes()
                digest.update(len(data).to_bytes(8, "little") + data)
            return digest.hexdigest()

        fixed = rollouts.fixed
        return [key(i) if fixed is not None and fixed[i] else None for i in range(len(rollouts.lengths))]

    def load(self, keys: Sequence[str | None], rows: Sequences, width: int) -> tuple[np.ndarray, np.ndarray]:
        """([M, T] which columns are known, [M, T, E] their states) of rows that hold these sequences."""
        known_B = np.array([key is not None and self._path(key).exists() for key in keys])
        known_MT = np.where(rows.segments > 0, known_B[rows.segments - 1], False)
        hidden = np.zeros((*known_MT.shape, width) if known_B.any() else (0,), self._dtype)
        for i in np.flatnonzero(known_B).tolist():
            hidden[self._columns(rows, i)] = np.load(self._path(keys[i])).view(self._dtype)
        return known_MT, hidden

    def store(self, keys: Sequence[str | None], rows: Sequences, hidden: np.ndarray) -> None:
        """Keeps the states of those sequences that are not there yet."""
        with refused_writes(self._directory):
            for i, key in enumerate(keys):
                if key is None or (path := self._path(key)).exists():
                    continue
                part = path.with_suffix(f".{os.getpid()}.part")
                with part.open("wb") as file:
                    np.save(file, hidden[self._columns(rows, i)].view(self._words))
                part.replace(path)

    def _path(self, key: str | None) -> Path:
        return self._directory / f"{key}.npy"

    @staticmethod
    def _columns(rows: Sequences, i: int) -> Any:
        return (rows.segments == i + 1) & np.asarray(rows.mask)
