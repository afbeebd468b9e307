"""Records from local files, self-made tasks and Hugging Face datasets: one loader, complaints with file and line."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from opd_jax import config
from opd_jax.errors import InputError
from opd_jax.stores import is_remote, local_file

PROBLEM_COLUMNS = ("problem", "question", "prompt")
ANSWER_COLUMNS = ("answer", "solution", "target", "reward_model.ground_truth")

Row = tuple[str, dict[str, Any], "Record"]  # where it stands (for messages), its columns, what is read of them
_Raw = tuple[str, bytes | dict[str, Any]]  # the same before it is parsed
ESCAPE = r"\boxed{{}}"  # unrendered, as in the paper's published training file
_ABSENT = object()

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One problem; ``answer`` is the gold answer, ``response`` a text to imitate, each where the source has it."""

    id: str
    problem: str
    answer: str | None = None
    response: str | None = None
    source: str = ""  # name of its part of ``data.mix``; empty where there is only one source


class BadRow(InputError):
    """A row that cannot be used; ``kind`` is what ``data.skip_bad`` counts it as."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def load_records(data: config.Data, seed: int = 0, require_answer: bool = False) -> list[Record]:
    """Reads all sources of ``data``, each in its order, at most ``data.limit`` rows of each.

    Columns are ``data.problem``, ``data.answer`` and ``data.response``, where None means the first of
    ``PROBLEM_COLUMNS`` and ``ANSWER_COLUMNS`` that the row has (a dot reaches into a nested column). A cell may be a
    list of chat messages: problems take the user's message, responses the assistant's. A gold answer that holds
    "####" (GSM8K) is what follows the last one. Ids come from the column ``id``, else they count the rows from 0; in
    a mixture they begin with the name of the part, as in ``dapo/17``.

    Args:
        seed: of a ``task:NAME`` source; the other sources do not depend on it.
        require_answer: refuse rows without a gold answer.

    Raises:
        InputError: unreadable, empty or malformed source; missing column; empty problem; repeated id; a missing
            answer or response where one is asked for. File and line are named. With ``data.skip_bad`` bad rows are
            left out, and a warning says how many of which kind.
    """
    bad: Counter[str] = Counter()
    records = [record for _, _, record in read_rows(data, bad, seed, require_answer)]
    if bad:
        log.warning("%s: %s", data.title, skipped(bad))
    if escaped := sum(ESCAPE in r.problem for r in records):
        log.warning(
            "%s: %d problems hold %s, an escape that nothing renders: the model sees double braces.",
            data.title,
            escaped,
            ESCAPE,
        )
    return records


def skipped(bad: Counter[str]) -> str:
    """As in "3 bad rows left out: 2 malformed JSON, 1 empty problem"."""
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in bad.most_common())
    return f"{bad.total():,} bad rows left out: {kinds}"


def read_rows(data: config.Data, bad: Counter[str], seed: int = 0, require_answer: bool = False) -> Iterator[Row]:
    """The rows behind ``load_records`` one by one; ``bad`` counts by kind those that ``data.skip_bad`` leaves out."""
    for name, part in data.parts.items():
        found = 0
        for where, row, record in _part_rows(part, bad, seed, require_answer):
            found += 1
            yield where, row, replace(record, id=f"{name}/{record.id}", source=name) if name else record
            if found == part.limit:
                break
        if not found:
            left = f" left ({skipped(bad)})" if bad else ""
            raise InputError(f"{part.source}: no rows{left}. Give a source with at least one problem.")


def _part_rows(data: config.Data, bad: Counter[str], seed: int, require_answer: bool) -> Iterator[Row]:
    first: dict[str, str] = {}  # id → where it stands
    if (data.source or "").startswith("task:"):
        data = data.model_copy(update={"response": data.response or "response"})
    for index, (where, raw) in enumerate(_raw_rows(data, seed)):
        try:
            row = _parsed(raw, where) if isinstance(raw, bytes) else raw
            record = _record(row, where, index, data)
            if record.id in first:
                raise BadRow(
                    "repeated id",
                    f"{where}: id {record.id!r} stands at {first[record.id]}, too. Ids must be unique: rename one, or "
                    "drop the column 'id' to have the rows numbered.",
                )
            if require_answer and record.answer is None:
                raise BadRow(
                    "no answer",
                    f"{where}: no answer (id {record.id!r}), but answers are verified here. Name the column with "
                    "data.answer=COLUMN, or fill it.",
                )
        except BadRow as e:
            if not data.skip_bad:
                raise
            bad[e.kind] += 1
            continue
        first[record.id] = where
        yield where, row, record


def _raw_rows(data: config.Data, seed: int) -> Iterator[_Raw]:
    source = data.source or ""
    suffix = PurePosixPath(source).suffix
    if source.startswith("task:"):
        from opd_jax.data.tasks import make_task

        rows = make_task(source.removeprefix("task:"), data.split, data.limit, seed)
        return ((f"{source} row {number}", dict(row)) for number, row in enumerate(rows, start=1))
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


def _jsonl_rows(path: Path, name: str) -> Iterator[_Raw]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield f"{name}:{number}", line


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as e:
        message = f"{where}: not UTF-8 (byte {e.start + 1} of the line). Save the file as UTF-8."
        raise BadRow("not UTF-8", message) from e
    except (ValueError, RecursionError) as e:  # ValueError: also a number of more than 4,300 digits
        raise BadRow("malformed JSON", f"{where}: malformed JSON ({e}). Expected one JSON object a line.") from e
    if not isinstance(row, dict):
        message = f"{where}: found a JSON {type(row).__name__}. Expected one JSON object a line."
        raise BadRow("malformed JSON", message)
    return row


def _parquet_rows(path: Path, name: str) -> Iterator[_Raw]:
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


def _hub_rows(data: config.Data) -> Iterator[_Raw]:
    import datasets

    source = str(data.source)
    name = source if data.subset is None else f"{source} ({data.subset})"
    # With a limit only the rows wanted are downloaded; a cache cannot be streamed from.
    streaming = data.limit is not None and not datasets.config.HF_DATASETS_OFFLINE  # pyright: ignore
    number = 0
    try:
        load: Any = datasets.load_dataset
        table = load(source, data.subset, split=data.split, streaming=streaming)
        for number, row in enumerate(table, start=1):
            yield f"{name} {data.split} row {number}", dict(row)
    except Exception as e:  # network, hub and builder errors share no base class
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise InputError(
            f"data.source={name}, split {data.split}: cannot load it as a Hugging Face dataset"
            f"{f', after row {number}' if number else ''} ({reason}). Where "
            "the hub is out of reach, give a local file of the same columns: data.source=PATH.jsonl or .parquet."
        ) from e


def _record(row: dict[str, Any], where: str, index: int, data: config.Data) -> Record:
    problem = _text(_column(row, data.problem, PROBLEM_COLUMNS, "data.problem", where), "user", where)
    if problem is None:
        raise BadRow("empty problem", f"{where}: the problem is empty. Fill it or remove the row.")
    answer = None
    if data.answer is not None or any(_cell(row, c) is not _ABSENT for c in ANSWER_COLUMNS):
        answer = _text(_column(row, data.answer, ANSWER_COLUMNS, "data.answer", where), "assistant", where)
        if answer is not None and "####" in answer:
            answer = answer.rpartition("####")[2].strip() or None
    response = None
    if data.response is not None:
        response = _text(_column(row, data.response, (), "data.response", where), "assistant", where)
        if response is None:
            message = f"{where}: the response (column '{data.response}') is empty. Fill it or remove the row."
            raise BadRow("empty response", message)
    identity = row.get("id")
    return Record(str(index if identity is None else identity), problem, answer, response)


def _column(row: dict[str, Any], name: str | None, defaults: tuple[str, ...], key: str, where: str) -> Any:
    names = defaults if name is None else (name,)
    for candidate in names:
        if (value := _cell(row, candidate)) is not _ABSENT:
            return value
    there = ", ".join(map(str, row)) or "none"
    message = f"{where}: no column {' or '.join(names)}. Columns there: {there}. Set {key}=COLUMN."
    raise BadRow("missing column", message)


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
            message = f"{where}: found a list that is no conversation. Expected messages {{role, content}}."
            raise BadRow("no conversation", message)
        contents = [m["content"] for m in value if m.get("role") == role]
        if len(contents) != 1:
            message = f"{where}: a conversation with {len(contents)} messages of role '{role}'. Expected one."
            raise BadRow("no conversation", message)
        value = contents[0]
    if value is None:
        return None
    if not isinstance(value, str | int | float):
        raise BadRow("not text", f"{where}: found {type(value).__name__} where text was expected.")
    return str(value) if str(value).strip() else None
