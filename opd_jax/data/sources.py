"""Records from local files, self-made tasks and Hugging Face datasets: one loader, complaints with file and line."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from opd_jax import config
from opd_jax.errors import InputError
from opd_jax.stores import is_remote, local_file

PROBLEM_COLUMNS = ("problem", "question", "prompt")
ANSWER_COLUMNS = ("answer", "solution", "target", "reward_model.ground_truth")

Row = tuple[str, dict[str, Any]]  # where it stands (for messages), its columns
_ABSENT = object()


@dataclass(frozen=True)
class Record:
    """One problem; ``answer`` is the gold answer, ``response`` a text to imitate, each where the source has it."""

    id: str
    problem: str
    answer: str | None = None
    response: str | None = None


def load_records(data: config.Data, seed: int = 0, require_answer: bool = False) -> list[Record]:
    """Reads ``data.source``, in its order, at most ``data.limit`` rows.

    Columns are ``data.problem``, ``data.answer`` and ``data.response``, where None means the first of
    ``PROBLEM_COLUMNS`` and ``ANSWER_COLUMNS`` that the row has (a dot reaches into a nested column). A cell may be a
    list of chat messages: problems take the user's message, responses the assistant's. A gold answer that holds
    "####" (GSM8K) is what follows the last one. Ids come from the column ``id``, else they count the rows from 0.

    Args:
        seed: of a ``task:NAME`` source; the other sources do not depend on it.
        require_answer: refuse rows without a gold answer.

    Raises:
        InputError: unreadable, empty or malformed source; missing column; empty problem; repeated id; a missing
            answer or response where one is asked for. File and line are named.
    """
    if data.source.startswith("task:"):
        records = _task_records(data, seed)
    else:
        rows = itertools.islice(_rows(data), data.limit)
        records = [_record(row, where, i, data) for i, (where, row) in enumerate(rows)]
    if not records:
        raise InputError(f"{data.source}: no rows. Give a source with at least one problem.")
    first_seen: dict[str, int] = {}
    for i, record in enumerate(records):
        if (first := first_seen.setdefault(record.id, i)) != i:
            raise InputError(
                f"{data.source}: id {record.id!r} stands twice, in rows {first + 1} and {i + 1} (counted from 1). "
                "Ids must be unique: rename one, or drop the column 'id' to have the rows numbered."
            )
        if require_answer and record.answer is None:
            raise InputError(
                f"{data.source}: row {i + 1} (id {record.id!r}) has no answer, but answers are verified here. "
                "Name the column with data.answer=COLUMN, or fill it."
            )
    return records


def _task_records(data: config.Data, seed: int) -> list[Record]:
    from opd_jax.data.tasks import make_task

    rows = make_task(data.source.removeprefix("task:"), data.split, data.limit, seed)
    return [Record(row["id"], row["problem"], row["answer"], row["response"]) for row in rows]


def _rows(data: config.Data) -> Iterator[Row]:
    source, suffix = data.source, PurePosixPath(data.source).suffix
    if suffix in (".jsonl", ".parquet"):
        path = local_file(source)
        if not path.is_file():
            raise InputError(f"data.source={source}: no such file. Give a path that exists, or a Hugging Face dataset.")
        return _jsonl_rows(path, source) if suffix == ".jsonl" else _parquet_rows(path, source)
    if suffix in (".json", ".csv", ".tsv", ".txt", ".gz", ".zst", ".arrow"):
        raise InputError(f"data.source={source}: cannot read '{suffix}' files. Convert it to .jsonl or .parquet.")
    if is_remote(source):
        raise InputError(f"data.source={source}: expected a .jsonl or .parquet file there.")
    return _hub_rows(data)


def _jsonl_rows(path: Path, name: str) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{name}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as e:
                raise InputError(f"{where}: not UTF-8 (byte {e.start + 1} of the line). Save the file as UTF-8.") from e
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as e:
                raise InputError(f"{where}: malformed JSON ({e}). Expected one JSON object a line.") from e
            if not isinstance(row, dict):
                raise InputError(f"{where}: found a JSON {type(row).__name__}. Expected one JSON object a line.")
            yield where, row


def _parquet_rows(path: Path, name: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as file, pyarrow.parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name} row {number}", row
    except (pyarrow.ArrowException, OSError) as e:
        raise InputError(f"{name}: not a readable Parquet file ({e}).") from e


def _hub_rows(data: config.Data) -> Iterator[Row]:
    import datasets

    name = data.source if data.subset is None else f"{data.source} ({data.subset})"
    try:
        table = datasets.load_dataset(data.source, data.subset, split=data.split)
    except Exception as e:  # network, hub and builder errors share no base class
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise InputError(
            f"data.source={name}, split {data.split}: cannot load it as a Hugging Face dataset ({reason}). "
            "Where the hub is out of reach, give a local file of the same columns: data.source=PATH.jsonl or .parquet."
        ) from e
    for number, row in enumerate(table, start=1):
        yield f"{name} {data.split} row {number}", dict(row)


def _record(row: dict[str, Any], where: str, index: int, data: config.Data) -> Record:
    problem = _text(_column(row, data.problem, PROBLEM_COLUMNS, "data.problem", where), "user", where)
    if problem is None:
        raise InputError(f"{where}: the problem is empty. Fill it or remove the row.")
    answer = None
    if data.answer is not None or any(_cell(row, c) is not _ABSENT for c in ANSWER_COLUMNS):
        answer = _text(_column(row, data.answer, ANSWER_COLUMNS, "data.answer", where), "assistant", where)
        if answer is not None and "####" in answer:
            answer = answer.rpartition("####")[2].strip() or None
    response = None
    if data.response is not None:
        response = _text(_column(row, data.response, (), "data.response", where), "assistant", where)
        if response is None:
            raise InputError(f"{where}: the response (column '{data.response}') is empty. Fill it or remove the row.")
    identity = row.get("id")
    return Record(str(index if identity is None else identity), problem, answer, response)


def _column(row: dict[str, Any], name: str | None, defaults: tuple[str, ...], key: str, where: str) -> Any:
    names = defaults if name is None else (name,)
    for candidate in names:
        if (value := _cell(row, candidate)) is not _ABSENT:
            return value
    there = ", ".join(map(str, row)) or "none"
    raise InputError(f"{where}: no column {' or '.join(names)}. Columns there: {there}. Set {key}=COLUMN.")


def _cell(row: dict[str, Any], name: str) -> Any:
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return _ABSENT
        value = value[part]
    return value


def _text(value: Any, role: str, where: str) -> str | None:
    """A cell as text, None when empty; of a list of chat messages the one message of that role."""
    if isinstance(value, list):
        if not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in value):
            raise InputError(f"{where}: found a list that is no conversation. Expected messages {{role, content}}.")
        contents = [m["content"] for m in value if m.get("role") == role]
        if len(contents) != 1:
            raise InputError(f"{where}: a conversation with {len(contents)} messages of role '{role}'. Expected one.")
        value = contents[0]
    if value is None:
        return None
    if not isinstance(value, str | int | float):
        raise InputError(f"{where}: found {type(value).__name__} where text was expected.")
    return str(value) if str(value).strip() else None
