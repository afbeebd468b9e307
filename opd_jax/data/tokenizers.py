"""Tokenizers from model directories: loading, whether two models share one, where a response may stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from etils import epath

from opd_jax.errors import InputError
from opd_jax.stores import local_directory

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def load_tokenizer(path: epath.PathLike) -> Any:
    """The tokenizer of a Hugging Face directory, without the hub and without the directory's own code.

    Raises:
        InputError: no such directory, or no tokenizer in it that ``transformers`` can read.
    """
    directory = local_directory(path)
    if not directory.is_dir():
        raise InputError(f"{path}: no such directory. Expected a Hugging Face model directory (see `opd import`).")
    if not any((directory / name).exists() for name in _FILES):
        raise InputError(f"{path}: no tokenizer there. Expected one of {', '.join(_FILES)} beside the weights.")
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # a broken file surfaces as any of a dozen types
        raise InputError(f"{path}: cannot read the tokenizer ({type(e).__name__}: {e}).") from e


def check_same_tokenizer(student: Any, teacher: Any) -> None:
    """Refuses a teacher whose ids mean other texts than the student's.

    The map token → id, added tokens included, has to agree. Special ids may differ (Qwen3 and its base model end with
    different tokens of one vocabulary): responses end where the student's settings say, see ``stop_ids``.

    Raises:
        InputError: the first differences, by id.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        by_id, by_id_theirs = ({i: t for t, i in vocabulary.items()} for vocabulary in (ours, theirs))
        differing = [i for i in sorted(by_id | by_id_theirs) if by_id.get(i) != by_id_theirs.get(i)]
        shown = "; ".join(f"id {i}: {by_id.get(i)!r} / {by_id_theirs.get(i)!r}" for i in differing[:3])
        raise InputError(
            f"student and teacher have different tokenizers: {len(ours)} / {len(theirs)} tokens, "
            f"{len(differing)} ids differ, first (student / teacher) {shown}. Choose a teacher with the student's "
            "tokenizer: divergences compare probabilities id by id."
        )


def stop_ids(path: epath.PathLike, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a response, ascending: of generation_config.json, config.json and the tokenizer together.

    Raises:
        InputError: malformed file, or no id in any of them.
    """
    found = set()
    for name in ("generation_config.json", "config.json"):
        file = local_directory(path) / name
        if file.exists():
            found |= _end_ids(file, f"{path}/{name}")
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    if not found:
        raise InputError(
            f"{path}: no end-of-sequence id in generation_config.json, config.json or the tokenizer, so no response "
            "could end. Set eos_token_id in generation_config.json."
        )
    return tuple(sorted(found))


def valid_vocab_size(tokenizer: Any) -> int:
    """Number of ids that mean something: the largest id of the tokenizer + 1. Logits beyond it are padding."""
    return max(tokenizer.get_vocab().values()) + 1


def check_vocabulary(path: epath.PathLike, outputs: int, tokens: int) -> None:
    """Raises InputError where a model has fewer output ids than its tokenizer has tokens."""
    if outputs < tokens:
        raise InputError(
            f"{path}: the model has {outputs} output ids, its tokenizer {tokens}. "
            "The tokenizer belongs to another model; give the directory the model's own."
        )


def _end_ids(file: Path, where: str) -> set[int]:
    try:
        value = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError, OSError) as e:
        raise InputError(f"{where}: not a JSON object ({e}).") from e
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise InputError(f"{where}: eos_token_id={value!r}. Expected an id or a list of ids.")
    return set(ids)
