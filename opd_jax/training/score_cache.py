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
from opd_jax.models.decoder import DecoderConfig
from opd_jax.types import Params, Rollouts, Sequences


class ScoreCache:
    """Files ``directory/KEY.npy``, one a text: [tokens of the response, E] hidden states, in the teacher's dtype.

    The key holds the teacher's weights and shape, prompt and response, so a cache may serve several runs. A file that
    is not whole, or of something else, counts as not there.
    """

    def __init__(self, directory: str, params: Params, config: DecoderConfig, dtype: Any):
        self._directory, self._dtype = Path(directory), jnp.dtype(dtype)
        self._words = np.dtype(f"uint{8 * self._dtype.itemsize}")  # .npy knows no bfloat16
        with refused_writes(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
        self._teacher = (json.dumps(describe(params), sort_keys=True) + repr(config)).encode()

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
        """([B] which sequences are known, [M, T, E] their states) of rows that hold these sequences."""
        hidden = np.zeros((*rows.tokens.shape, width) if any(keys) else (0,), self._dtype)
        known = np.zeros(len(keys), bool)
        for i, key in enumerate(keys):
            columns = self._columns(rows, i)
            if key is not None and (states := self._read(key, (int(columns.sum()), width))) is not None:
                known[i], hidden[columns] = True, states
        return known, hidden

    def store(self, keys: Sequence[str | None], rows: Sequences, hidden: np.ndarray) -> None:
        """Keeps the states of the sequences that have a key."""
        with refused_writes(self._directory):
            for i, key in enumerate(keys):
                if key is not None:
                    part = self._path(key).with_suffix(f".{os.getpid()}.part")
                    with part.open("wb") as file:
                        np.save(file, hidden[self._columns(rows, i)].view(self._words))
                    part.replace(self._path(key))

    def _read(self, key: str, shape: tuple[int, int]) -> np.ndarray | None:
        try:
            with self._path(key).open("rb") as file:
                words = np.lib.format.read_array(file, allow_pickle=False)
        except (OSError, ValueError):
            return None
        return words.view(self._dtype) if (words.dtype, words.shape) == (self._words, shape) else None

    def _path(self, key: str) -> Path:
        return self._directory / f"{key}.npy"

    @staticmethod
    def _columns(rows: Sequences, i: int) -> Any:
        return (rows.segments == i + 1) & np.asarray(rows.mask)
