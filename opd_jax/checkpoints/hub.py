"""Exported models to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from etils import epath

from opd_jax.errors import InputError
from opd_jax.stores import is_remote


def check_push(repository: str | None, private: bool, out: epath.PathLike, name: str = "--push") -> None:
    """Refuses, before anything is written, what could not be pushed; ``repository`` None: nothing is to be.

    ``name``: of the option or setting, for messages.

    Raises:
        InputError: not a repository's name, ``private`` without one, or ``out`` in an object store.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if repository is None:
        if private:
            raise InputError("--private: is of the repository that --push names; give --push USER/NAME")
        return
    try:
        validate_repo_id(repository)
    except HFValidationError as e:
        raise InputError(f"{name} {repository}: not a repository's name ({e}). Expected USER/NAME.") from e
    if is_remote(out):
        raise InputError(f"{name} {repository}: uploads a local directory; give one in place of {out}")


def push_model(directory: Path, repository: str, *, private: bool = False) -> str:
    """Uploads a model directory into a repository, which is made if it is not there; returns the commit's URL.

    ``private`` holds for a new repository only. The token is that of ``hf auth login``, or HF_TOKEN.

    Raises:
        InputError: no token, no permission, or the Hub cannot be reached; ``directory`` stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return api.upload_folder(repo_id=repository, folder_path=directory, commit_message="opd export").commit_url
    except Exception as e:  # of its own, OSError, ValueError, and those of whichever HTTP library it is built on
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise InputError(
            f"{repository}: the Hugging Face Hub did not take it ({reason}). The model is whole in {directory}. "
            f"Check the network, log in with `hf auth login`, then: hf upload {repository} {directory}"
        ) from e
