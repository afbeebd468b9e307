"""Hugging Face checkpoints in and out, without torch: config.json, safetensors (one file or shards), tokenizer files.

Reading goes weight by weight: the parts of this process's devices are sliced out of the files, so that a host never
holds more than its part of one weight. Files may lie in an object store, where only the wanted rows are fetched.
Writing goes shard by shard into a temporary directory that is renamed, or copied into the store, when it is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from jax.experimental import multihost_utils

from opd_jax.errors import InputError
from opd_jax.mesh import Layout
from opd_jax.models.decoder import DecoderConfig, layer_specs, parameter_shardings, parameter_specs
from opd_jax.models.families import config_from_hf, config_to_hf
from opd_jax.models.stored_safetensors import StoredSafetensors
from opd_jax.stores import file_names, is_remote, local_directory, store_path, upload
from opd_jax.types import Params

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
TOP_NAMES = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
LAYER_NAMES = {
    "attention_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    **{n: f"self_attn.{n}_proj.weight" for n in "qkvo"},
    **{f"{n}_bias": f"self_attn.{n}_proj.bias" for n in "qkv"},
}
READABLE = ("F32", "F16", "BF16")


class Tensor(NamedTuple):
    """One tensor of a checkpoint: where it belongs in the tree, and the shape that the decoder gives it there."""

    name: str
    key: str
    layer: int | None
    shape: tuple[int, ...]  # heads split off

    @property
    def flat_shape(self) -> tuple[int, ...]:
        """The shape in the file: [N, H, D] → [N·H, D], [N, H] → [N·H], [D, N, H] → [D, N·H]."""
        if self.key in ("q", "k", "v"):
            return self.shape[0] * self.shape[1], self.shape[2]
        if self.key == "o":
            return self.shape[0], self.shape[1] * self.shape[2]
        return (self.shape[0] * self.shape[1],) if self.key.endswith("_bias") else self.shape

    def take(self, params: Params) -> Any:
        weight = params[self.key] if self.layer is None else params["layers"][self.key][self.layer]
        return weight.reshape(self.flat_shape)


def checkpoint_tensors(c: DecoderConfig) -> Iterator[Tensor]:
    """Every tensor of the checkpoint of a decoder, in file order."""
    specs = parameter_specs(c)
    yield Tensor(TOP_NAMES["embed"], "embed", None, specs["embed"].shape)
    for i in range(c.layers):
        for key, spec in layer_specs(c).items():
            yield Tensor(f"model.layers.{i}.{LAYER_NAMES[key]}", key, i, spec.shape)
    for key in ("norm", "head"):
        if key in specs:
            yield Tensor(TOP_NAMES[key], key, None, specs[key].shape)


def load_config(path: epath.PathLike) -> DecoderConfig:
    """The decoder that ``path/config.json`` describes.

    Raises:
        InputError: no such file, not JSON, or what ``config_from_hf`` refuses.
    """
    file = local_directory(path) / "config.json"
    if not file.is_file():
        raise InputError(f"{path}: no config.json; expected a Hugging Face directory (config.json, *.safetensors)")
    where = f"{path}/config.json"
    return config_from_hf(read_json(file, where), where)


def load_model(
    path: epath.PathLike, layout: Layout | None = None, dtype: Any = jnp.float32
) -> tuple[Params, DecoderConfig]:
    """Weights (layers stacked, cast to ``dtype``) and configuration of a Hugging Face directory.

    With a ``layout`` each weight is made sharded; a process reads the rows that its own devices hold.

    Raises:
        InputError: missing, unexpected, ill-shaped or quantised tensors; damaged files; no safetensors; a mesh that a
            weight does not divide over.
    """
    config = load_config(path)
    files = Checkpoint(path)
    tensors = {t.name: t for t in checkpoint_tensors(config)}
    _check_tensors(files, tensors, config)
    shardings = parameter_shardings(config, layout) if layout else None
    single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def weight(members: list[Tensor], sharding: Any) -> jax.Array:
        return _weight(files, members, sharding or single, np.dtype(dtype))

    params: Params = {"layers": {}}
    for key in layer_specs(config):
        members = [t for t in tensors.values() if t.key == key and t.layer is not None]
        params["layers"][key] = weight(members, shardings and shardings["layers"][key])
    for tensor in tensors.values():
        if tensor.layer is None:
            params[tensor.key] = weight([tensor], shardings and shardings[tensor.key])
    return params, config


def stored_dtype(path: epath.PathLike) -> str:
    """``bfloat16`` where every tensor is stored so, else ``float32`` (which holds float16 exactly)."""
    files = Checkpoint(path)
    return "bfloat16" if {files.slice(name).get_dtype() for name in files.where} == {"BF16"} else "float32"


class Checkpoint:
    """The safetensors files of a directory; ``where`` maps each tensor name to its file."""

    def __init__(self, path: epath.PathLike):
        self.path = store_path(path)
        self._open: dict[epath.Path, tuple[Any, frozenset[str]]] = {}
        names = file_names(path)
        if INDEX in names:
            entries = read_json(local_directory(path) / INDEX, f"{path}/{INDEX}").get("weight_map")
            if not isinstance(entries, dict) or any("/" in str(f) or not isinstance(f, str) for f in entries.values()):
                raise InputError(f"{path}/{INDEX}: expected a weight_map from tensor names to file names beside it")
            self.where = {name: self.path / file for name, file in entries.items()}
            for name, file in self.where.items():
                if name not in self._file(file)[1]:
                    raise InputError(f"{file}: tensor '{name}' is missing, though {INDEX} places it there")
        elif SINGLE in names:
            self.where = dict.fromkeys(self._file(self.path / SINGLE)[1], self.path / SINGLE)
        else:
            other = sorted(n for n in names if n.endswith((".bin", ".pt", ".pth", ".gguf")))
            found = f"found {', '.join(other)}" if other else "found no weights"
            raise InputError(
                f"{path}: expected {SINGLE} or {INDEX}; {found}. Only safetensors are read here: "
                "import a .gguf with `opd import`; convert pickled weights (.bin, .pt) with "
                "transformers' save_pretrained."
            )

    def _file(self, file: epath.Path) -> tuple[Any, frozenset[str]]:
        if file not in self._open:
            try:
                if is_remote(file):
                    handle: Any = StoredSafetensors(file)
                else:
                    handle = safetensors.safe_open(file, framework="numpy")
            except InputError:
                raise
            except (OSError, ValueError, safetensors.SafetensorError) as e:
                raise InputError(f"{file}: not a whole safetensors file ({e}). Fetch it again.") from e
            self._open[file] = handle, frozenset(handle.keys())
        return self._open[file]

    def slice(self, name: str) -> Any:
        """A lazy tensor: ``get_shape``, ``get_dtype``, and indexing by slices."""
        return self._file(self.where[name])[0].get_slice(name)


def _check_tensors(files: Checkpoint, tensors: dict[str, Tensor], c: DecoderConfig) -> None:
    for name, tensor in tensors.items():
        if name not in files.where:
            raise InputError(
                f"{files.path}: tensor '{name}' is missing; config.json describes a {c.family} model of {c.layers} "
                f"layers, tie_word_embeddings = {str(c.tie_embeddings).lower()}"
            )
        stored = files.slice(name)
        if tuple(stored.get_shape()) != tensor.flat_shape:
            raise InputError(
                f"{files.where[name]}: tensor '{name}' has shape {stored.get_shape()}; config.json implies "
                f"{list(tensor.flat_shape)}"
            )
        if stored.get_dtype() not in READABLE:
            raise InputError(
                f"{files.where[name]}: tensor '{name}' is stored as {stored.get_dtype()}; expected one of "
                f"{', '.join(READABLE)}. Quantised weights are not read."
            )
    for name in files.where.keys() - tensors.keys():
        if name == TOP_NAMES["head"]:
            _check_tied(files)
        elif not name.endswith("rotary_emb.inv_freq"):  # a buffer of old exports, recomputed here
            raise InputError(f"{files.where[name]}: unexpected tensor '{name}' for a {c.family} model")


def _check_tied(files: Checkpoint) -> None:
    head, embed = files.slice(TOP_NAMES["head"]), files.slice(TOP_NAMES["embed"])
    rows = range(0, embed.get_shape()[0], 4096)
    blocks = [slice(i, min(i + rows.step, rows.stop)) for i in rows]
    same = head.get_shape() == embed.get_shape() and all(np.array_equal(head[b], embed[b]) for b in blocks)
    if not same:
        raise InputError(
            f"{files.where[TOP_NAMES['head']]}: lm_head.weight differs from model.embed_tokens.weight, but config.json "
            "says tie_word_embeddings = true. Set it to false if the head is meant, or remove the tensor."
        )


def _weight(files: Checkpoint, members: list[Tensor], sharding: Any, dtype: np.dtype) -> jax.Array:
    """A weight, the layers of ``members`` stacked; each tensor's rows are read once, whatever devices share them."""
    stacked = members[0].layer is not None
    shape = (len(members), *members[0].shape) if stacked else members[0].shape
    indices = sharding.addressable_devices_indices_map(shape).values()
    bounds = sorted({_bounds(index, shape) for index in indices})  # those of the same rows follow each other
    blocks = {bound: np.empty([stop - start for start, stop in bound], dtype) for bound in bounds}
    for layer, tensor in enumerate(members):
        for bound, block in blocks.items():
            if not stacked:
                bound = ((0, 1), *bound)
                block = block[None]
            (first, last), *inner = bound
            if first <= layer < last:
                row = block[layer - first]
                row[...] = np.asarray(files.slice(tensor.name)[_flat_slices(tensor, inner)]).reshape(row.shape)
    return jax.make_array_from_callback(shape, sharding, lambda index: blocks[_bounds(index, shape)])


def _bounds(index: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))


def _flat_slices(tensor: Tensor, bounds: list[tuple[int, int]]) -> tuple[slice, ...]:
    """Slices of the file's tensor; the head-size axis, which is never sharded, folds into the heads before it."""
    if tensor.shape == tensor.flat_shape:
        return tuple(slice(*b) for b in bounds)
    heads = 1 if tensor.key == "o" else 0
    size = tensor.shape[heads + 1]
    merged = [*bounds[:heads], (bounds[heads][0] * size, bounds[heads][1] * size), *bounds[heads + 2 :]]
    return tuple(slice(*b) for b in merged)


def save_model(
    path: epath.PathLike,
    params: Params,
    config: DecoderConfig,
    *,
    tokenizer_from: epath.PathLike | None = None,
    dtype: str = "float32",
    max_shard_bytes: float = 5e9,
    extra: Mapping[str, str] | None = None,
    replace: bool = False,
) -> None:
    """Writes a Hugging Face directory: config.json, safetensors, and the tokenizer files of ``tokenizer_from``.

    Args:
        dtype: ``float32`` or ``bfloat16``, as stored.
        max_shard_bytes: weights beyond this size go to several files with an index.
        extra: further text files, name → content.
        replace: what stands at ``path`` makes way once the new directory is whole (in a store, as the upload begins).

    Raises:
        InputError: without ``replace``, ``path`` exists and is not an empty directory; ``tokenizer_from`` is not a
            directory; or a store refuses.
    """
    if not replace:
        check_target(path)
    tokenizer = None if tokenizer_from is None else local_directory(tokenizer_from)
    if tokenizer is not None and not tokenizer.is_dir():
        raise InputError(f"{tokenizer_from}: not a directory; expected one with tokenizer files")
    with _new_directory(path) as partial:
        _write_weights(partial, params, config, np.dtype(dtype), max_shard_bytes)
        if jax.process_index() == 0:
            ids = _carry_tokenizer(tokenizer, partial) if tokenizer else {}
            _write_json(partial / "config.json", config_to_hf(config, **ids, dtype=dtype))
            for name, text in (extra or {}).items():
                (partial / name).write_text(text)


def check_target(path: epath.PathLike) -> None:
    """Refuses a directory to write that already holds something."""
    target = store_path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target}: exists and is not empty. Give a new directory, or remove this one first.")


@contextlib.contextmanager
def _new_directory(path: epath.PathLike) -> Iterator[Path]:
    """A temporary directory that takes the place of ``path`` on success and is removed on failure."""
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="opd-jax-") as scratch:
            yield Path(scratch)
            if jax.process_index() == 0:
                if store_path(path).exists():
                    store_path(path).rmtree()
                # what names the weights comes last: before that a reader finds no model
                for file in sorted(Path(scratch).iterdir(), key=lambda f: (f.name in (INDEX, "config.json"), f.name)):
                    upload(file, store_path(path) / file.name)
        return
    target, replaced = Path(path), None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as e:
        raise InputError(f"{target}: cannot write there ({e.strerror}). Give another directory.") from e
    try:
        yield partial
        if jax.process_index() == 0:
            partial.chmod(0o755)  # mkdtemp makes it private
            if target.exists():
                os.rename(target, replaced := partial.with_name(partial.name + ".old"))
            os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced:
            shutil.rmtree(replaced, ignore_errors=True)


def _write_weights(path: Path, params: Params, c: DecoderConfig, dtype: np.dtype, max_bytes: float) -> None:
    shards: list[list[Tensor]] = [[]]
    filled = total = 0
    for tensor in checkpoint_tensors(c):
        size = int(np.prod(tensor.shape)) * dtype.itemsize
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
        total += size
    n = len(shards)
    names = [SINGLE] if n == 1 else [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
    for name, shard in zip(names, shards, strict=True):
        arrays = {t.name: _host(t.take(params)).astype(dtype) for t in shard}
        if jax.process_index() == 0:
            # transformers refuses files without this mark
            safetensors.numpy.save_file(arrays, path / name, metadata={"format": "pt"})
            (path / name).chmod(0o644)  # safetensors makes it private
    if n > 1 and jax.process_index() == 0:
        weight_map = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
        _write_json(path / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _host(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return multihost_utils.process_allgather(x, tiled=True)
    return np.ascontiguousarray(x)


def _carry_tokenizer(source: Path, target: Path) -> dict[str, Any]:
    """Copies the tokenizer's files; returns the special ids that the source's configuration names."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    ids: dict[str, Any] = {}
    for name in ("generation_config.json", "config.json"):
        d = read_json(source / name) if (source / name).is_file() else {}
        ids |= {k: d[k] for k in ("eos_token_id", "bos_token_id", "pad_token_id") if d.get(k) is not None}
    return ids


def read_json(file: Path, where: str | None = None) -> dict[str, Any]:
    """A JSON object from a file; ``where`` is its name in messages, if another.

    Raises:
        InputError: unreadable, not JSON, or not an object.
    """
    where = where or str(file)
    try:
        d = json.loads(file.read_text())
    except (OSError, ValueError) as e:
        raise InputError(f"{where}: not readable as JSON ({e})") from e
    if not isinstance(d, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(d).__name__}")
    return d


def _write_json(file: Path, d: dict[str, Any]) -> None:
    file.write_text(json.dumps(d, indent=2) + "\n")
