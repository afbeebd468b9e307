"""``opd data``: see what a model is prompted with, drop duplicates, keep the rollouts that are worth imitating."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opd_jax.commands.shared import JsonPath, check_writable, write_json

if TYPE_CHECKING:
    from opd_jax.config import Data
    from opd_jax.data.dedup import Duplicate, Placed
    from opd_jax.data.sources import Record

Row = dict[str, Any]

GRADED_AT_ONCE = 2048  # responses

SOURCE_HELP = "JSONL, Parquet, task:NAME or a dataset id; settings may follow in quotes, as 'openai/gsm8k subset=main'"
OUT_HELP = "JSONL file to write"

data_app = typer.Typer(
    no_args_is_help=True, help="Looks at data, drops duplicates, filters rollouts.", add_completion=False
)

SkipBad = Annotated[bool, typer.Option("--skip-bad", help="leave out rows that cannot be used, and count them")]
Out = Annotated[Path, typer.Option("--out", help=OUT_HELP)]


@data_app.command()
def show(
    sources: Annotated[list[str], typer.Argument(help=f"{SOURCE_HELP}; or a configuration (.yaml)")],
    model: Annotated[
        str | None, typer.Option(help="Hugging Face directory with the tokenizer; default: the configuration's student")
    ] = None,
    prompts: Annotated[int, typer.Option("-n", min=0, help="how many prompts of each source to show")] = 3,
    skip_bad: SkipBad = False,
    json_path: JsonPath = None,
) -> None:
    """Shows the tokens of the first prompts as a model sees them, and how many rows there are, how long, how many fit.

    Special tokens are written out; on a terminal they have a colour.
    """
    from opd_jax.data.tokenizers import load_tokenizer
    from opd_jax.errors import InputError
    from opd_jax.tracking.console import console

    check_writable("--json", json_path)
    results = []
    for spec in sources:
        data, student = _section(spec, skip_bad)
        if (path := model or student) is None:
            raise InputError(f"{spec}: whose tokens? Give --model DIR, a Hugging Face directory with a tokenizer.")
        tokenizer = load_tokenizer(path)
        for name, part in data.parts.items():
            results.append({"name": name or data.title} | _shown(part, tokenizer, prompts))
    names = ("rows", "dropped", "truncated", "tokens_median", "tokens_95", "tokens_longest")
    heads = ("source", "rows", "dropped", "truncated", "tokens, median", "95 %", "longest", "bad rows")
    console.table("prompts", heads, [[r["name"], *(r[n] for n in names), sum(r["bad_rows"].values())] for r in results])
    write_json(json_path, results)


@data_app.command()
def dedup(
    source: Annotated[str, typer.Argument(help=SOURCE_HELP)],
    out: Out,
    against: Annotated[
        list[str] | None, typer.Option(help="also drop what stands there: another source; may be given several times")
    ] = None,
    near: Annotated[
        str | None, typer.Option(help="also drop what a sentence-transformers model finds similar (directory or name)")
    ] = None,
    similarity: Annotated[float, typer.Option(min=-1, max=1, help="--near: least cosine that counts as similar")] = 0.6,
    report: Annotated[Path | None, typer.Option(help="write every row that was dropped, and why, here (JSONL)")] = None,
    skip_bad: SkipBad = False,
    json_path: JsonPath = None,
) -> None:
    """Writes a source without the problems that repeat each other or stand in other sources (contamination).

    Equal are problems with the same text but for an instruction around it, case, spacing, LaTeX fonts and punctuation;
    against other sources letters and digits alone count. Problems that stand there with different answers all go.
    """
    from opd_jax.data.dedup import find_duplicates, load_embedder
    from opd_jax.tracking.console import console

    for option, path in (("--json", json_path), ("--report", report), ("--out", out)):
        check_writable(option, path)
    bad: Counter[str] = Counter()
    embed = load_embedder(near) if near else None
    read = _read(source, skip_bad, bad)
    rows: list[Placed] = [(where, record) for where, _, record in read]
    others: dict[str, list[Placed]] = {
        spec: [(where, record) for where, _, record in _read(spec, skip_bad, bad)] for spec in against or []
    }
    found = find_duplicates(rows, [placed for other in others.values() for placed in other], embed, similarity)
    dropped = {duplicate.index for duplicate in found}
    with _lines(out) as write:
        for i, (_, row, _) in enumerate(read):
            if i not in dropped:
                write(row)
    home = {where: spec for spec, other in others.items() for where, _ in other}
    counts = Counter((home.get(d.of[0], source), d.reason) for d in found)
    if report:
        with _lines(report) as write:
            for duplicate in found:
                write(_told(rows, duplicate))
    result = {
        "source": source,
        "rows": len(rows),
        "kept": len(rows) - len(found),
        "dropped": [{"stands_in": spec, "reason": reason, "rows": n} for (spec, reason), n in counts.items()],
        "bad_rows": dict(bad),
    }
    console.table(
        f"{source}: {len(rows):,} rows, {result['kept']:,} kept in {out}",
        ["stands in", "reason", "rows dropped"],
        [[spec, reason, n] for (spec, reason), n in counts.items()],
    )
    _warn_of(bad)
    write_json(json_path, result)


@data_app.command("filter")
def filter_rollouts(
    rollouts: Annotated[str, typer.Argument(help="JSONL as `opd generate` writes it")],
    out: Out,
    keep_wrong: Annotated[bool, typer.Option("--keep-wrong", help="also keep responses with a wrong answer")] = False,
    max_repeated: Annotated[
        float, typer.Option(min=0, max=1, help="largest share of words in phrases of 20 that stood there before")
    ] = 0.3,
    skip_bad: SkipBad = False,
    json_path: JsonPath = None,
) -> None:
    """Keeps responses worth imitating: not truncated, not repetitive, right (cold start, paper C.1).

    What it writes is a source for kind: sft, with data.response=response. Repetitive is a response that ends in a
    phrase repeated three times or more, or whose words lie in repeated phrases to more than --max-repeated.
    """
    check_writable("--json", json_path)
    check_writable("--out", out)
    write_json(json_path, filter_file(rollouts, out, keep_wrong, max_repeated, skip_bad))


def filter_file(rollouts: str, out: Path, keep_wrong: bool, max_repeated: float, skip_bad: bool) -> Row:
    """As the command; returns how many responses there were, how many were kept, and why the others were not."""
    from opd_jax.tracking.console import console

    bad: Counter[str] = Counter()
    counts: Counter[str] = Counter(dict.fromkeys(("kept", "empty", "truncated", "repetitive", "wrong"), 0))
    with _lines(out) as write:
        for row, verdict in _judged(rollouts, skip_bad, bad, keep_wrong, max_repeated):
            counts[verdict] += 1
            if verdict == "kept":
                write(row)
    result = {"rollouts": rollouts, "out": str(out), "responses": counts.total()} | dict(counts)
    columns = [name for name in result if name not in ("rollouts", "out")]
    console.table(f"{rollouts} → {out}", columns, [[result[name] for name in columns]])
    _warn_of(bad)
    return result | {"bad_rows": dict(bad)}


def _section(spec: str, skip_bad: bool) -> tuple[Data, str | None]:
    """The data section that an argument describes, and the model whose prompts they are where it says so."""
    from opd_jax.config_files import load_config, parse_data
    from opd_jax.errors import InputError

    try:
        source, *settings = [spec] if os.path.exists(spec) else shlex.split(spec)
    except ValueError as e:
        raise InputError(f"{spec!r}: cannot be read as a source with settings ({e or 'it is empty'}).") from e
    if source.endswith((".yaml", ".yml")):
        config = load_config(source, settings)
        return config.data.model_copy(update={"skip_bad": skip_bad or config.data.skip_bad}), config.student.path
    return parse_data(source, [*settings, *(["skip_bad=true"] if skip_bad else [])]), None


def _read(spec: str, skip_bad: bool, bad: Counter[str]) -> list[tuple[str, Row, Record]]:
    from opd_jax.data.sources import read_rows

    return list(read_rows(_section(spec, skip_bad)[0], bad))


def _warn_of(bad: Counter[str]) -> None:
    from opd_jax.data.sources import skipped
    from opd_jax.tracking.console import console

    if bad:
        console.warn(skipped(bad))


def _shown(data: Data, tokenizer: Any, prompts: int) -> Row:
    """Prints the first prompts of one source; returns what is to be said of all."""
    import numpy as np
    from rich.text import Text

    from opd_jax.data.pipeline import encode_prompts
    from opd_jax.data.sources import ESCAPE, read_rows
    from opd_jax.data.templates import strip_instruction
    from opd_jax.tracking.console import console

    bad: Counter[str] = Counter()
    records = [record for _, _, record in read_rows(data, bad)]
    whole = encode_prompts(records, tokenizer, data.model_copy(update={"overlong": "truncate", "max_prompt": 2**31}))[0]
    lengths = np.array([len(tokens) for tokens in whole])
    too_long = int(np.sum(lengths > data.max_prompt))
    cut = data.overlong == "truncate"
    fitting = [r for r, n in zip(records, lengths, strict=True) if cut or n <= data.max_prompt][:prompts]
    encoded = encode_prompts(fitting, tokenizer, data)[0] if fitting else []
    for record, tokens in zip(fitting, encoded, strict=True):
        console.print(f"── {data.title} {record.id}: {len(tokens)} tokens", style="bold")
        text = Text.assemble(
            *((piece, "bold cyan" if special else "") for piece, special in _pieces(tokens, tokenizer))
        )
        console.terminal.print(text, soft_wrap=True)
    escaped = sum(ESCAPE in record.problem for record in records)
    instructed = 0 if data.template == "plain" else sum(strip_instruction(r.problem) != r.problem for r in records)
    if escaped:
        console.warn(
            f"{data.title}: {escaped:,} problems hold {ESCAPE}, an escape that nothing renders: the model sees double "
            "braces. Mend the file."
        )
    if instructed:
        console.warn(
            f"{data.title}: {instructed:,} problems hold an instruction already, and data.template={data.template!r} "
            "adds another. Set data.template=plain."
        )
    return {
        "rows": len(records),
        "dropped": 0 if cut else too_long,
        "truncated": too_long if cut else 0,
        "tokens_median": float(np.median(lengths)),
        "tokens_95": float(np.percentile(lengths, 95)),
        "tokens_longest": int(lengths.max()),
        "bad_rows": dict(bad),
        "with_escape": escaped,
        "with_instruction": instructed,
        "prompts": [
            {"id": record.id, "tokens": tokens, "text": "".join(text for text, _ in _pieces(tokens, tokenizer))}
            for record, tokens in zip(fitting, encoded, strict=True)
        ],
    }


def _pieces(tokens: list[int], tokenizer: Any) -> list[tuple[str, bool]]:
    """(text, whether it is a token of its own beside the vocabulary) of a prompt, in order."""
    added = tokenizer.added_tokens_decoder
    runs: list[tuple[list[int], bool]] = []
    for token in tokens:
        if token in added or not runs or runs[-1][1]:
            runs.append(([token], token in added))
        else:
            runs[-1][0].append(token)
    return [(tokenizer.decode(run, skip_special_tokens=False), special) for run, special in runs]


def _told(rows: list[Placed], duplicate: Duplicate) -> Row:
    (where, record), (of_where, of) = rows[duplicate.index], duplicate.of
    told = {"where": where, "id": record.id, "reason": duplicate.reason, "of_where": of_where, "of_id": of.id}
    told |= {} if duplicate.similarity is None else {"similarity": round(duplicate.similarity, 4)}
    return told | {"problem": record.problem, "answer": record.answer, "of_problem": of.problem, "of_answer": of.answer}


def _judged(
    spec: str, skip_bad: bool, bad: Counter[str], keep_wrong: bool, max_repeated: float
) -> Iterator[tuple[Row, str]]:
    """Every rollout with "kept" or the first reason against it."""
    from opd_jax.data.filters import ends_in_a_loop, repeated_share
    from opd_jax.data.sources import read_rows
    from opd_jax.errors import InputError
    from opd_jax.evaluation.answers import AnswerPool

    def unfit(where: str, row: Row) -> str | None:
        missing = {"response", "finish_reason"} - row.keys()
        if missing:
            raise InputError(
                f"{where}: no column {' and '.join(sorted(missing))}. Columns there: {', '.join(row)}. Expected what "
                '`opd generate` writes: response, and finish_reason "stop" or "length".'
            )
        text = str(row["response"] or "")
        if not text.strip():
            return "empty"
        if row["finish_reason"] != "stop":
            return "truncated"
        return "repetitive" if ends_in_a_loop(text) or repeated_share(text) > max_repeated else None

    def graded(rows: list[tuple[Row, Record]]) -> Iterator[tuple[Row, str]]:
        right = [True] * len(rows)
        if not keep_wrong:
            right = pool.grade([(str(row["response"]), record.answer or "") for row, record in rows])
        for (row, _), ok in zip(rows, right, strict=True):
            yield row, "kept" if ok else "wrong"

    waiting: list[tuple[Row, Record]] = []
    data = _section(spec, skip_bad)[0]
    with AnswerPool() as pool:
        for where, row, record in read_rows(data, bad, require_answer=not keep_wrong):
            if reason := unfit(where, row):
                yield row, reason
                continue
            waiting.append((row, record))
            if len(waiting) == GRADED_AT_ONCE:
                yield from graded(waiting)
                waiting = []
        yield from graded(waiting)


@contextlib.contextmanager
def _lines(path: Path) -> Iterator[Callable[[Row], None]]:
    """Writes rows as JSONL; the file appears when all are written."""
    from opd_jax.errors import InputError

    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            # A lone surrogate in a text becomes \udXXX, which is its JSON escape; a date of a Parquet file its text.
            yield lambda row: _write(file, row)
        temporary.replace(path)
    except OSError as e:
        raise InputError(f"{path}: cannot write ({e.strerror or e}). Make room, or give another file.") from e
    finally:
        temporary.unlink(missing_ok=True)


def _write(file: Any, row: Row) -> None:
    file.write((json.dumps(row, ensure_ascii=False, default=str) + "\n").encode("utf-8", "backslashreplace"))
