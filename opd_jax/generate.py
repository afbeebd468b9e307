"""``opd generate``: responses of a model to prompts, by continuous batching, in a JSONL file that no kill can spoil.

The file is also a source of training data: columns ``problem``, ``answer`` and ``response``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from opd_jax.config import Data
from opd_jax.data.pipeline import encode_prompts
from opd_jax.data.sources import Record, load_records
from opd_jax.data.tokenizers import check_vocabulary, load_tokenizer, stop_ids, valid_vocab_size
from opd_jax.errors import InputError, Interrupted
from opd_jax.mesh import Layout, make_mesh
from opd_jax.models.hf import load_model
from opd_jax.sampling.decode import Engine, make_engine
from opd_jax.sampling.law import Law
from opd_jax.sampling.scheduler import Occupancy, Request, Response, generate
from opd_jax.tracking.console import Progress, console
from opd_jax.tracking.run_dir import write_atomically
from opd_jax.types import Params

Row = dict[str, Any]
Finished = dict[tuple[int, int], tuple[int, bool]]  # (prompt id, sample) → (tokens, ended by an end-of-sequence id)

GENERATE_STEP = 0  # the "step" of the random-number law; training counts from 1
SHOWN = ("tokens_per_second", "occupancy")  # of ``Meter.row``, by the progress bar


class Sampler(NamedTuple):
    """A model ready to sample, its rows sharded over all devices."""

    engine: Engine
    weights: Params
    layout: Layout

    def slots(self, wanted: int, rows: int) -> int:
        """``wanted``, but no more than there are rows, rounded up to the batch shards."""
        ways = self.layout.mesh.size
        return max(1, -(-min(wanted, rows) // ways)) * ways


def load_sampler(model: Path, tokenizer: Any, dtype: Any) -> Sampler:
    """Loads the weights of a Hugging Face directory in ``dtype``.

    Raises:
        InputError: no end-of-sequence id, a tokenizer with more ids than the model has, or unreadable weights.
    """
    vocab_size, stops = valid_vocab_size(tokenizer), stop_ids(model, tokenizer)
    layout = Layout(make_mesh())
    params, config = load_model(model, layout, dtype)
    check_vocabulary(model, config.vocab_size, vocab_size)
    engine = make_engine(config, stop_ids=stops, vocab_size=vocab_size, support=0, dtype=dtype, layout=layout)
    return Sampler(engine, engine.cast(params), layout)


def all_requests(encoded: Sequence[list[int]], samples: int) -> list[Request]:
    """``samples`` neighbouring requests for each prompt, whose id is its index."""
    return [Request(tokens, i, sample) for i, tokens in enumerate(encoded) for sample in range(samples)]


class Meter(Occupancy):
    """Occupancy that moves a progress bar after every segment.

    Once ``stop`` is set, the segment that runs is the last whose responses are yielded: the next raises Interrupted.
    """

    def __init__(self, bar: Progress, finished: int = 0, stop: threading.Event | None = None):
        super().__init__(finished=finished)
        self._bar, self._stop, self._stopping = bar, stop, False
        self._start = (0, time.monotonic())
        self._segments = 0

    def add(self, busy: int, everything: int, waiting: bool, ended: int) -> None:
        if self._stopping:
            raise Interrupted(f"stopped with {self.finished:,} responses finished; continue with --resume")
        super().add(busy, everything, waiting, ended)
        self._segments += 1
        self._bar.update(self.finished, self.row())
        if self._segments == 1:  # it holds the compilation
            self._start = (self.busy, time.monotonic())
        self._stopping = self._stop is not None and self._stop.is_set()

    def row(self) -> dict[str, float]:
        """Tokens per second, after the first segment if there were more, and the share of slots that made tokens."""
        if not self.all:
            return {}
        tokens, since = self._start
        speed = (self.busy - tokens) / (time.monotonic() - since)
        return {"tokens_per_second": speed, "occupancy": self.busy / self.all}


def generate_file(
    model: Path,
    data: Data,
    out: Path,
    *,
    samples: int,
    problems: int | None,
    max_response: int,
    law: Law,
    slots: int,
    seed: int,
    dtype: str,
    resume: bool = False,
    stop: threading.Event | None = None,
) -> Row:
    """Samples ``samples`` responses to each prompt of ``data`` and appends each to ``out`` when it is finished.

    A line holds ``id``, ``prompt_id`` (index of the prompt among those kept), ``sample``, ``problem``, ``answer``
    (where there is one), ``response``, ``prompt_tokens``, ``tokens``, ``logp`` (nats, under ``law``, one a token) and
    ``finish_reason`` ("stop" or "length"). Returns a summary of the whole file.

    Raises:
        InputError: anything that cannot work, found before ``out`` is begun; or a full disk: ``out`` keeps all lines
            that were finished.
        Interrupted: ``stop`` was set; ``resume`` then makes the lines that are missing.
    """
    meta = Path(f"{out}.meta.json")
    check_target(out, meta, resume)
    tokenizer = load_tokenizer(model)
    records = load_records(data, seed)
    encoded, records, overlong = encode_prompts(records, tokenizer, data)
    encoded, records = encoded[:problems], records[:problems]
    settings: Row = {"model": str(model), "model_fingerprint": fingerprint(model)}
    settings |= {"prompts": len(records), "prompts_sha256": _digest(records, encoded)}
    settings |= given_settings(data, samples, problems, max_response, law, seed, dtype)
    finished, size = read_finished(out, meta, settings, _finished) if resume else ({}, 0)
    requests = [r for r in all_requests(encoded, samples) if (r.id, r.sample) not in finished]
    sampler = load_sampler(model, tokenizer, jnp.dtype(dtype))
    slots = sampler.slots(slots, len(requests))
    total = len(records) * samples
    console.print(
        f"{data.title}: {len(records):,} prompts{overlong.note()} × {samples} responses, {slots} slots"
        + (f"; resumed with {len(finished):,} of {total:,} done" if resume else "")
    )
    empty = 0
    with refused_writes(out, meta, finished):
        if not resume:
            write_atomically(epath.Path(meta), json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        with (
            console.progress(total, "generating", len(finished), unit="response", show=SHOWN) as bar,
            Lines(out, size) as lines,
        ):
            meter = Meter(bar, len(finished), stop)
            made = generate(
                sampler.engine, sampler.weights, requests, law, seed, GENERATE_STEP,
                slots=slots, max_response=max_response, occupancy=meter,
            )  # fmt: skip
            for index, response in made:
                request = requests[index]
                row = _row(records[request.id], request, response, tokenizer)
                lines.write(row)
                finished[request.id, request.sample] = len(response.tokens), response.stopped
                empty += not row["response"].strip()
            bar.update(len(finished), meter.row())
    if empty:
        console.warn(f"{empty:,} of the new responses have no text; data.response=response refuses such rows")
    result: Row = {"model": str(model), "source": data.title, "out": str(out), "prompts": len(records)}
    result |= {"dropped_prompts": overlong.dropped, "truncated_prompts": overlong.truncated, "samples": samples}
    return _summary(result, finished, meter)


def given_settings(
    data: Data, samples: int, problems: int | None, max_response: int, law: Law, seed: int, dtype: str
) -> Row:
    """Of the settings kept beside the responses those that need no file to be read."""
    settings: Row = {f"data.{name}": value for name, value in data.model_dump(mode="json").items()}
    settings |= {"samples": samples, "problems": problems, "max_response": max_response}
    return settings | {**law._asdict(), "seed": seed, "dtype": dtype}


def _summary(result: Row, finished: Finished, meter: Meter) -> Row:
    lengths, stopped = zip(*finished.values(), strict=True)
    result |= {
        "responses": len(finished),
        "response_length": float(np.mean(lengths)),
        "truncation_rate": 1 - float(np.mean(stopped)),
        "tokens_per_second": None,
        "occupancy": None,
    } | meter.row()
    columns = {"responses": "responses", "response_length": "mean length", "truncation_rate": "truncated"}
    columns |= {"tokens_per_second": "tokens/s", "occupancy": "slot occupancy"}
    console.table(result["out"], list(columns.values()), [[result[name] for name in columns]])
    return result


def check_finite(record: Record, response: Response) -> None:
    """Raises InputError where the model did not give probabilities."""
    if not np.isfinite(response.logp).all():
        raise InputError(
            f"prompt {record.id!r}: the model's log-probabilities are not finite. Its weights are damaged, or "
            "overflow: look at them, or try --dtype float32."
        )


def _row(record: Record, request: Request, response: Response, tokenizer: Any) -> Row:
    check_finite(record, response)
    tokens = response.tokens.tolist()
    answer = {} if record.answer is None else {"answer": record.answer}
    return {
        "id": f"{record.id}.{request.sample}",
        "prompt_id": request.id,
        "sample": request.sample,
        "problem": record.problem,
        **answer,
        "response": tokenizer.decode(tokens, skip_special_tokens=True),
        "prompt_tokens": request.tokens,
        "tokens": tokens,
        "logp": [round(x, 6) for x in response.logp.tolist()],
        "finish_reason": "stop" if response.stopped else "length",
    }


class Lines(contextlib.AbstractContextManager[Any]):
    """Appends whole lines after the first ``size`` bytes of a file; a line that finds no room is taken back."""

    def __init__(self, path: Path, size: int):
        self._file, self._size = FileIO(path, "ab"), size
        self._file.truncate(size)

    def write(self, row: Row) -> None:
        # A lone surrogate in a model's text becomes \udXXX, which is its JSON escape.
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        written = 0
        try:
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)
            raise
        self._size += len(line)

    def __exit__(self, *_: Any) -> None:
        self._file.close()


@contextlib.contextmanager
def refused_writes(out: Path, meta: Path, finished: Collection[Any]) -> Iterator[None]:
    """A full disk becomes an InputError that tells how many responses ``out`` keeps."""
    try:
        yield
    except OSError as e:
        raise InputError(
            f"{out}: cannot write ({e.strerror or e}). Its {len(finished):,} finished responses are kept: "
            f"make room and {'continue with --resume' if meta.exists() else 'begin again'}."
        ) from e


def check_target(out: Path, meta: Path, resume: bool) -> None:
    """Refuses to begin a file of responses that stands there, and to resume one without its settings, ``meta``."""
    if out.suffix != ".jsonl":
        raise InputError(f"OUT {out}: expected the name of a .jsonl file.")
    if resume and not meta.exists():
        raise InputError(f"{out}: nothing to resume (no {meta.name} beside it). Start without --resume, or mend OUT.")
    if not resume and out.exists():
        raise InputError(f"{out}: exists. Continue it with --resume, or give another file.")


def check_settings(out: Path, meta: Path, settings: Row) -> Row:
    """What ``meta`` holds; refuses ``settings`` that differ from it."""
    try:
        stored = json.loads(meta.read_text(encoding="utf-8"))
        differing = [
            f"  {name}: it was begun with {stored.get(name)!r}, now {value!r}"
            for name, value in settings.items()
            if name != "model" and stored.get(name) != value  # where the model lies changes nothing
        ]
    except (OSError, ValueError, AttributeError) as e:
        raise InputError(f"{meta}: cannot be read ({e}). Without it nothing is resumed: give another OUT.") from e
    if differing:
        raise InputError(
            f"{out}: the settings differ from those that it was begun with:\n"
            + "\n".join(differing)
            + f"\nResume with those of {meta}, or give another OUT."
        )
    return stored


def read_finished(
    out: Path, meta: Path, settings: Row, read: Callable[[Row], tuple[Any, Any]]
) -> tuple[dict[Any, Any], int]:
    """What the file holds, by ``read``: line → (key, value); and the bytes up to the end of its last whole line.

    Raises:
        InputError: ``settings`` differ from those in ``meta``, or a line that ``read`` does not understand.
    """
    check_settings(out, meta, settings)
    finished, size = {}, 0
    if not out.exists():
        return finished, size
    with out.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break  # a kill cut it short
            try:
                key, value = read(json.loads(line))
            except (ValueError, KeyError, TypeError) as e:
                raise InputError(f"{out}:{number}: not a line of this command ({e!r}). Remove it.") from e
            finished[key] = value
            size += len(line)
    return finished, size


def _finished(row: Row) -> tuple[tuple[int, int], tuple[int, bool]]:
    return (row["prompt_id"], row["sample"]), (len(row["tokens"]), row["finish_reason"] == "stop")


def fingerprint(model: Path) -> str:
    """Hash of the model's settings and of 64 evenly spaced pages of every weight file, which no training leaves."""
    digest = hashlib.sha256()
    for path in sorted([*model.glob("*.safetensors"), *model.glob("*config.json")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for offset in range(0, size, max(4096, size // 64)):
                file.seek(offset)
                digest.update(file.read(4096))
    return digest.hexdigest()


def _digest(records: Sequence[Record], encoded: Sequence[list[int]]) -> str:
    rows = [[r.id, r.problem, r.answer, tokens] for r, tokens in zip(records, encoded, strict=True)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
