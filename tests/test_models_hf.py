"""Checkpoints in and out: bit-exact, sharded, on a mesh; damaged ones are refused with the tensor and file named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import small_models

from opd_jax.errors import InputError
from opd_jax.mesh import Layout, make_mesh
from opd_jax.models.decoder import parameter_shardings
from opd_jax.models.hf import INDEX, SINGLE, load_config, load_model, save_model, stored_dtype

EMBED = "model.embed_tokens.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def qwen3(tmp_path: Path) -> Path:
    return small_models.write("qwen3", tmp_path / "qwen3")


def assert_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def rewrite(path: Path, change: Any) -> None:
    """Applies ``change`` to the dict of tensors of a directory."""
    tensors = safetensors.numpy.load_file(path / SINGLE)
    change(tensors)
    safetensors.numpy.save_file(tensors, path / SINGLE, metadata={"format": "pt"})


def reconfigure(path: Path, **fields: Any) -> None:
    d = json.loads((path / "config.json").read_text()) | fields
    (path / "config.json").write_text(json.dumps(d))


@pytest.mark.parametrize("name", list(small_models.CONFIGS))
def test_import_export_import_is_exact(name: str, tmp_path: Path) -> None:
    params, config = load_model(small_models.write(name, tmp_path / "a"))
    save_model(tmp_path / "b", params, config)
    again, config_again = load_model(tmp_path / "b")
    assert config_again == config
    assert_equal(again, params)
    written = safetensors.numpy.load_file(tmp_path / "b" / SINGLE)
    assert_equal(written, small_models.tensors(name))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_types(dtype: str, qwen3: Path, tmp_path: Path) -> None:
    rewrite(qwen3, lambda t: t.update({k: v.astype(np.dtype(dtype)) for k, v in t.items()}))
    params, config = load_model(qwen3)
    expected = small_models.tensors("qwen3")[EMBED].astype(np.dtype(dtype)).astype(np.float32)
    np.testing.assert_array_equal(params["embed"], expected)
    assert stored_dtype(qwen3) == ("bfloat16" if dtype == "bfloat16" else "float32")
    narrow, _ = load_model(qwen3, dtype=ml_dtypes.bfloat16)
    assert {x.dtype.name for x in jax.tree.leaves(narrow)} == {"bfloat16"}
    if dtype == "bfloat16":
        save_model(tmp_path / "out", params, config, dtype="bfloat16")
        assert_equal(load_model(tmp_path / "out")[0], params)


def test_shards_out_and_in(qwen3: Path, tmp_path: Path) -> None:
    params, config = load_model(qwen3)
    save_model(tmp_path / "out", params, config, max_shard_bytes=40_000)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    files = sorted(f.name for f in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
    assert all((tmp_path / "out" / f).stat().st_size < 45_000 for f in files)
    assert_equal(load_model(tmp_path / "out")[0], params)


def test_mesh_equals_one_device(qwen3: Path, tmp_path: Path) -> None:
    params, config = load_model(qwen3)
    layout = Layout(make_mesh(fsdp=4, tensor=2))
    sharded, _ = load_model(qwen3, layout)
    assert_equal(sharded, params)
    shardings = parameter_shardings(config, layout)
    assert jax.tree.map(lambda x, s: x.sharding == s, sharded, shardings) == jax.tree.map(lambda _: True, shardings)
    assert sharded["layers"]["o"].addressable_shards[0].data.shape == (2, 12, 2, 20)
    save_model(tmp_path / "out", sharded, config)
    assert_equal(load_model(tmp_path / "out")[0], params)


def test_tokenizer_files_and_ids_are_carried(qwen3: Path, tmp_path: Path) -> None:
    (qwen3 / "chat_template.jinja").write_text("{{ messages }}")
    (qwen3 / "tokenizer.json").write_text("{}")
    (qwen3 / "generation_config.json").write_text('{"eos_token_id": [5, 6], "pad_token_id": 5}')
    (qwen3 / "pytorch_model.bin").write_text("")
    params, config = load_model(qwen3)
    save_model(tmp_path / "out", params, config, tokenizer_from=qwen3, extra={"note.txt": "hello"})
    written = {f.name for f in (tmp_path / "out").iterdir()}
    carried = {"chat_template.jinja", "tokenizer.json", "generation_config.json"}
    assert written == carried | {"config.json", SINGLE, "note.txt"}
    d = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (d["eos_token_id"], d["pad_token_id"], d["bos_token_id"]) == ([5, 6], 5, None)


def test_nothing_half_written(qwen3: Path, tmp_path: Path) -> None:
    params, config = load_model(qwen3)
    with pytest.raises(KeyError):
        save_model(tmp_path / "new" / "out", {"embed": params["embed"]}, config)
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(InputError, match="exists and is not empty"):
        save_model(qwen3, params, config)
    with pytest.raises(InputError, match=r"no-such.*not a directory"):
        save_model(tmp_path / "x", params, config, tokenizer_from=tmp_path / "no-such")


def test_tied_head(tmp_path: Path) -> None:
    path = small_models.write("qwen2_tied", tmp_path / "m")
    plain, _ = load_model(path)
    rewrite(path, lambda t: t.update({"lm_head.weight": t[EMBED].copy()}))
    assert_equal(load_model(path)[0], plain)
    rewrite(path, lambda t: t["lm_head.weight"].__setitem__((3, 4), 9.0))
    with pytest.raises(InputError, match=r"lm_head.weight differs .* tie_word_embeddings = true"):
        load_model(path)


def test_old_rotary_buffers_are_ignored(qwen3: Path) -> None:
    rewrite(qwen3, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(10, np.float32)}))
    load_model(qwen3)


TENSOR_FAULTS = {
    "missing": (lambda t: t.pop(QUERY), rf"tensor '{QUERY}' is missing"),
    "no head": (lambda t: t.pop("lm_head.weight"), r"'lm_head.weight' is missing.*tie_word_embeddings = false"),
    "unexpected": (
        lambda t: t.update({"model.extra": t[EMBED]}),
        r"model.safetensors: unexpected tensor 'model.extra'",
    ),
    "shape": (lambda t: t.update({QUERY: t[QUERY][:7]}), rf"'{QUERY}' has shape \[7, 48\].*implies \[80, 48\]"),
    "quantised": (lambda t: t.update({QUERY: t[QUERY].astype(np.int8)}), rf"'{QUERY}' is stored as I8"),
}


@pytest.mark.parametrize("fault", list(TENSOR_FAULTS))
def test_wrong_tensors(fault: str, qwen3: Path) -> None:
    change, message = TENSOR_FAULTS[fault]
    rewrite(qwen3, change)
    with pytest.raises(InputError, match=message):
        load_model(qwen3)


def test_damaged_files(qwen3: Path) -> None:
    whole = (qwen3 / SINGLE).read_bytes()
    for cut in (whole[:-5], whole[:100], b"", b"\xff" * 64):
        (qwen3 / SINGLE).write_bytes(cut)
        with pytest.raises(InputError, match=r"model.safetensors: not a whole safetensors file"):
            load_model(qwen3)


def test_missing_files(qwen3: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: no config.json"):
        load_model(tmp_path / "nowhere")
    (qwen3 / SINGLE).rename(qwen3 / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"found pytorch_model.bin. Only safetensors are read"):
        load_model(qwen3)
    (qwen3 / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json: not readable as JSON"):
        load_config(qwen3)


def test_wrong_index(qwen3: Path, tmp_path: Path) -> None:
    params, config = load_model(qwen3)
    path = tmp_path / "out"
    save_model(path, params, config, max_shard_bytes=40_000)
    index = json.loads((path / INDEX).read_text())
    for file, message in (("none.safetensors", "none.safetensors: not a whole"), ("../x", "weight_map")):
        broken = {"weight_map": index["weight_map"] | {QUERY: file}}
        (path / INDEX).write_text(json.dumps(broken))
        with pytest.raises(InputError, match=message):
            load_model(path)
    first = index["weight_map"][EMBED]
    (path / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {QUERY: first}}))
    with pytest.raises(InputError, match=rf"{first}: tensor '{QUERY}' is missing"):
        load_model(path)


def test_mesh_that_does_not_divide(tmp_path: Path) -> None:
    path = small_models.write("llama3_rope", tmp_path / "m")
    with pytest.raises(InputError, match="embed: axis 'vocab' has size 101"):
        load_model(path, Layout(make_mesh(tensor=2)))
