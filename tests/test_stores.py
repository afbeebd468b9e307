"""Models, data and exports in an object store, which is a dictionary here; the readers are those of gs://."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import fake_store
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import small_models
import tiny_runs
from etils import epath
from fake_store import FakeStore
from test_models_hf import assert_equal, rewrite

from opd_jax import stores
from opd_jax.config import Data
from opd_jax.data.sources import load_records
from opd_jax.data.tokenizers import load_tokenizer, stop_ids
from opd_jax.errors import InputError
from opd_jax.mesh import Layout, make_mesh
from opd_jax.models.hf import INDEX, SINGLE, check_target, load_config, load_model, save_model, stored_dtype
from opd_jax.models.stored_safetensors import StoredSafetensors


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(stores, "WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(stores, "CHUNK", 1000)  # several requests a tensor
    yield fake_store.install(monkeypatch)
    stores._copy.cache_clear()


@pytest.fixture
def qwen3(tmp_path: Path) -> Path:
    return small_models.write("qwen3", tmp_path / "qwen3")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_slices_equal_the_library_bit_for_bit(dtype: str, store: Any, qwen3: Path) -> None:
    rewrite(qwen3, lambda t: t.update({k: v.astype(np.dtype(dtype)) for k, v in t.items()}))
    remote = fake_store.upload(qwen3, "gs://b/qwen3")
    ours = StoredSafetensors(f"{remote}/{SINGLE}")
    theirs = safetensors.safe_open(qwen3 / SINGLE, framework="numpy")
    assert sorted(ours.keys()) == sorted(theirs.keys())
    for name in theirs.keys():  # noqa: SIM118 (no mapping)
        a, b = ours.get_slice(name), theirs.get_slice(name)
        assert (a.get_shape(), a.get_dtype()) == (b.get_shape(), b.get_dtype())
        n = b.get_shape()[0]
        rest = (slice(3, 11),) * (len(b.get_shape()) - 1)
        for key in (slice(0, n), (slice(n // 3, n // 2), *rest), (slice(0, n), *rest), (slice(2, 2), *rest)):
            assert a[key].dtype == np.dtype(dtype)
            assert a[key].tobytes() == np.ascontiguousarray(b[key]).tobytes()


def test_model_equals_the_local_one(store: Any, qwen3: Path) -> None:
    params, config = load_model(qwen3)
    save_model(qwen3.with_name("sharded"), params, config, max_shard_bytes=40_000)
    for path in (qwen3, qwen3.with_name("sharded")):
        remote = fake_store.upload(path, f"gs://b/{path.name}")
        again, config_again = load_model(remote)
        assert config_again == config
        assert_equal(again, params)
    assert stored_dtype("gs://b/sharded") == "float32"


@pytest.mark.parametrize("sizes", [(1, 4, 2), (1, 8, 1), (4, 1, 2)])
def test_every_byte_is_read_once_whatever_the_mesh(sizes: tuple[int, int, int], store: Any, qwen3: Path) -> None:
    """Eight devices in one process hold every row between them; columns and replicas of the same rows cost nothing."""
    params, _ = load_model(qwen3)
    remote = fake_store.upload(qwen3, "gs://b/qwen3")
    sharded, _ = load_model(remote, Layout(make_mesh(*sizes)))
    assert_equal(sharded, params)
    data = sum(x.nbytes for x in safetensors.numpy.load_file(qwen3 / SINGLE).values())
    header = 1 << 16
    assert data <= store.bytes_read(SINGLE) <= data + header
    assert max(stop - start for _, start, stop in store.reads if start > header) <= 1000


def test_a_process_reads_the_rows_of_its_devices(store: Any, qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the four tensor shards are taken for this process's devices: half the rows of what is sharded by rows."""
    from opd_jax.models import hf

    layout = Layout(make_mesh(1, 1, 8))
    files = hf.Checkpoint(fake_store.upload(qwen3, "gs://b/qwen3"))
    embed = next(t for t in hf.checkpoint_tensors(load_config(qwen3)) if t.key == "embed")
    sharding = layout.sharding(("vocab", None))

    class TwoOfEight:
        def addressable_devices_indices_map(self, shape: Any) -> Any:
            return dict(list(sharding.addressable_devices_indices_map(shape).items())[2:4])

    made: dict[Any, np.ndarray] = {}
    monkeypatch.setattr(
        hf.jax,
        "make_array_from_callback",
        lambda shape, s, f: made.update({i[0].start: f(i) for i in s.addressable_devices_indices_map(shape).values()}),
    )
    before = store.bytes_read(SINGLE)
    hf._weight(files, [embed], TwoOfEight(), np.dtype(np.float32))
    rows, width = embed.shape
    assert store.bytes_read(SINGLE) - before == rows // 4 * width * 4
    whole = safetensors.numpy.load_file(qwen3 / SINGLE)["model.embed_tokens.weight"]
    assert sorted(made) == [rows // 4, rows // 4 + rows // 8]
    for start, block in made.items():
        np.testing.assert_array_equal(block, whole[start : start + rows // 8])


def test_failures_that_pass_are_repeated(store: Any, qwen3: Path) -> None:
    params, _ = load_model(qwen3)
    remote = fake_store.upload(qwen3, "gs://b/qwen3")
    load_config(remote)
    store.failures += [ConnectionResetError("reset"), TimeoutError(), OSError("503")]
    assert_equal(load_model(remote)[0], params)
    assert not store.failures
    store.failures += [OSError("503 from the store")] * 4
    with pytest.raises(InputError, match=r"gs://b/qwen3/model\.safetensors: the store refuses \(503 from the store\)"):
        load_model(remote)


def test_a_short_answer_is_no_answer(store: Any, qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params, _ = load_model(qwen3)
    remote = fake_store.upload(qwen3, "gs://b/qwen3")
    monkeypatch.setattr(stores, "CHUNK", 1 << 20)
    whole, calls = FakeStore.cat_file, iter(range(10**6))
    monkeypatch.setattr(FakeStore, "cat_file", lambda *a, **k: whole(*a, **k)[: None if next(calls) % 3 else -1])
    assert_equal(load_model(remote)[0], params)


def header_of(d: Any, data: bytes = b"\0" * 8) -> bytes:
    text = json.dumps(d).encode()
    return struct.pack("<Q", len(text)) + text + data


BAD_FILES = {
    "empty": (b"", "0 bytes"),
    "short": (b"\1\0\0", "3 bytes"),
    "long header": (struct.pack("<Q", 1 << 40) + b"{}", r"claims 1,099,511,627,776 bytes of 10"),
    "no JSON": (struct.pack("<Q", 4) + b"\xff\xfe{}", "not JSON"),
    "deep JSON": (struct.pack("<Q", 100_000) + b"[" * 100_000, "not JSON"),
    "list": (header_of([]), "not a JSON object"),
    "dtype": (header_of({"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}), "entry of tensor 'a'"),
    "negative": (header_of({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}), "entry of tensor 'a'"),
    "one offset": (header_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}), "entry of tensor 'a'"),
    "size": (header_of({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}), r"'a' \(F32 \[3\]\) lies at"),
    "backwards": (header_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}), "lies at"),
    "hole": (header_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}), "lies at bytes 4 to 8"),
    "beyond": (header_of({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}), "describes"),
    "cut": (header_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 7), "describes"),
    "trailing": (header_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 9), "describes"),
}


@pytest.mark.parametrize("fault", list(BAD_FILES))
def test_damaged_files(fault: str, store: Any, qwen3: Path) -> None:
    content, message = BAD_FILES[fault]
    remote = fake_store.upload(qwen3, "gs://b/m")
    store().pipe_file(f"b/m/{SINGLE}", content)
    with pytest.raises(InputError, match=rf"gs://b/m/{SINGLE}: not a whole safetensors file \(.*{message}"):
        load_model(remote)


def test_wrong_models(store: Any, qwen3: Path) -> None:
    with pytest.raises(InputError, match=r"gs://b/none: no such file or directory"):
        load_model("gs://b/none")
    remote = fake_store.upload(qwen3, "gs://b/m")
    store().rm_file(f"b/m/{SINGLE}")
    store().pipe_file("b/m/pytorch_model.bin", b"x")
    with pytest.raises(InputError, match=r"gs://b/m: expected model\.safetensors.*found pytorch_model\.bin"):
        load_model(remote)
    store().pipe_file("b/broken/config.json", b"{")
    with pytest.raises(InputError, match=r"gs://b/broken/config\.json: not readable as JSON"):
        load_config("gs://b/broken")


def test_missing_drivers_and_unknown_schemes() -> None:
    with pytest.raises(InputError, match=r"hdfs://x/y: unknown kind of path; expected a local one or gs://"):
        load_model("hdfs://x/y")
    try:
        import adlfs  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        with pytest.raises(InputError, match=r"az://x/y: az:// paths need pip install adlfs"):
            load_model("az://x/y")


def test_missing_gcsfs_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(scheme: str) -> None:
        raise ImportError(f"{scheme} needs gcsfs")

    monkeypatch.setattr(stores.fsspec, "get_filesystem_class", absent)
    for use in (load_model, load_tokenizer, check_target, lambda p: load_records(Data(source=f"{p}.jsonl"))):
        with pytest.raises(InputError, match=r"gs://x/y\S*: gs:// paths need pip install 'opd-jax\[gcs\]'"):
            use("gs://x/y")


def test_export_to_a_store_and_back(store: Any, tmp_path: Path) -> None:
    models = tiny_runs.write_models(tmp_path)
    params, config = load_model(models / "teacher")
    target = "gs://b/out"
    check_target(target)
    store.failures.append(OSError("once"))
    save_model(target, params, config, tokenizer_from=models / "teacher", max_shard_bytes=40_000)
    names = [path.rpartition("/")[2] for path in store.written]
    assert names[-2:] == ["config.json", INDEX]
    assert len([n for n in names if n.endswith(".safetensors")]) > 1
    assert_equal(load_model(target)[0], params)
    local, remote = load_tokenizer(models / "teacher"), load_tokenizer(target)
    assert remote.get_vocab() == local.get_vocab()
    assert stop_ids(target, remote) == stop_ids(models / "teacher", local)
    with pytest.raises(InputError, match=r"gs://b/out: exists and is not empty"):
        save_model(target, params, config)
    save_model(tmp_path / "back", *load_model(target), tokenizer_from=target)
    assert load_tokenizer(tmp_path / "back").get_vocab() == local.get_vocab()
    assert_equal(load_model(tmp_path / "back")[0], params)


def test_a_failed_export_leaves_no_model(store: Any, qwen3: Path) -> None:
    params, config = load_model(qwen3)
    store.failures += [PermissionError("no write access")]
    with pytest.raises(InputError, match=r"gs://b/out/.*the store refuses \(no write access\)"):
        save_model("gs://b/out", params, config)
    assert not any(path.endswith("config.json") for path in FakeStore.store)


def test_prompts_from_a_store(store: Any, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"problem": f"{i} + 1 ?", "answer": str(i + 1)} for i in range(5)]
    store().pipe_file("b/p.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    store().pipe_file("b/p.parquet", (tmp_path / "p.parquet").read_bytes())
    found = load_records(Data(source="gs://b/p.jsonl"))
    assert [r.answer for r in found] == ["1", "2", "3", "4", "5"]
    assert load_records(Data(source="gs://b/p.parquet")) == found
    store().pipe_file("b/bad.jsonl", b'{"problem": "a"}\n{\n')
    with pytest.raises(InputError, match=r"gs://b/bad\.jsonl:2: malformed JSON"):
        load_records(Data(source="gs://b/bad.jsonl"))
    with pytest.raises(InputError, match=r"gs://b/none\.jsonl: no such file"):
        load_records(Data(source="gs://b/none.jsonl"))
    with pytest.raises(InputError, match=r"gs://b/folder: expected a \.jsonl or \.parquet"):
        load_records(Data(source="gs://b/folder"))


def test_local_files_through_the_same_reader(qwen3: Path) -> None:
    file = StoredSafetensors(epath.Path(qwen3) / SINGLE)
    for name, tensor in safetensors.numpy.load_file(qwen3 / SINGLE).items():
        np.testing.assert_array_equal(file.get_slice(name)[:], tensor)
    assert file.get_slice("lm_head.weight").get_dtype() == "F32"


def test_orbax_gets_the_path_of_the_store(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(stores.absolute(epath.Path("gs://b/runs/1"))) == "gs://b/runs/1"
    assert stores.absolute("runs/1") == epath.Path(tmp_path / "runs/1")
