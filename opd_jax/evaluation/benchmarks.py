"""Benchmarks by name, or any file: which problems they are is told by their source, number and a content hash."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from opd_jax.config import Data
from opd_jax.config_files import parse_data
from opd_jax.data.pipeline import Overlong, encode_prompts
from opd_jax.data.sources import Record, load_records
from opd_jax.errors import InputError
from opd_jax.tracking.console import console


class Benchmark(NamedTuple):
    """A test set on the Hugging Face hub."""

    source: str
    split: str
    problems: int
    subset: str | None = None


BENCHMARKS = {
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train", 30),
    "aime25": Benchmark("math-ai/aime25", "test", 30),
    "amc23": Benchmark("math-ai/amc23", "test", 40),  # another set of that name has 83
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test", 500),
    "gsm8k": Benchmark("openai/gsm8k", "test", 1319, "main"),
}
_FILES = (".jsonl", ".parquet")


@dataclass(frozen=True)
class Problems:
    """The problems of one benchmark as a model is asked them."""

    name: str
    data: Data
    records: list[Record]
    encoded: list[list[int]]
    overlong: Overlong

    @property
    def sha256(self) -> str:
        """Of problems and gold answers, in order; not of ids, prompts or templates."""
        rows = [[r.problem, r.answer] for r in self.records]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    @property
    def source(self) -> str:
        """Where they come from, in words."""
        d = self.data
        if d.title.endswith(_FILES):
            return d.title
        return " ".join(filter(None, (d.title, d.subset, d.split)))


def parse_benchmarks(items: Sequence[str], directory: Path | None = None) -> dict[str, Data]:
    """Name → data section of what the command line names, in its order.

    An item is a name of ``BENCHMARKS``, a .jsonl or .parquet file, NAME=FILE, ``task:NAME``, a Hugging Face dataset id,
    or a data setting ``key=value`` that holds for all. The template is ``boxed`` (the paper's), of a task ``plain``.

    Args:
        directory: where the files NAME.jsonl, NAME_SPLIT.jsonl or .parquet of named benchmarks lie; None: on the hub.

    Raises:
        InputError: no benchmark, an unknown or repeated name, a file that is missing, a setting that is none.
    """
    sources: dict[str, Benchmark] = {}
    settings = []
    for item in items:
        key, equals, value = item.partition("=")
        if equals and not (key.isidentifier() and key not in Data.model_fields and value.endswith(_FILES)):
            settings.append(item)
            continue
        name, source = (key, Benchmark(value, "train", 0)) if equals else _named(item, directory)
        if name in sources:
            raise InputError(f"{item}: '{name}' stands twice. Name each benchmark once, or rename one by NAME=FILE.")
        sources[name] = source
    if not sources:
        raise InputError(f"no benchmark given. Name {', '.join(BENCHMARKS)}, a .jsonl or .parquet file, or task:NAME.")
    return {name: _data(source, settings) for name, source in sources.items()}


def load_problems(
    benchmarks: Mapping[str, Data], tokenizer: Any, seed: int, first: int | None = None
) -> list[Problems]:
    """The problems of each, encoded; ``first``: no more than that many.

    Raises:
        InputError: what ``load_records`` and ``encode_prompts`` refuse, or a problem without an answer.
    """
    loaded = []
    for name, data in benchmarks.items():
        records = load_records(data, seed, require_answer=True)
        known = BENCHMARKS.get(name)
        if known and data.limit is None and len(records) != known.problems:
            console.warn(f"{name}: {len(records):,} problems in {data.title}; the published set has {known.problems:,}")
        encoded, records, overlong = encode_prompts(records, tokenizer, data)
        loaded.append(Problems(name, data, records[:first], encoded[:first], overlong))
    return loaded


def _named(item: str, directory: Path | None) -> tuple[str, Benchmark]:
    known = BENCHMARKS.get(item)
    if known and directory:
        files = [f"{stem}{suffix}" for stem in (item, f"{item}_{known.split}") for suffix in _FILES]
        found = next((directory / file for file in files if (directory / file).is_file()), None)
        if found is None:
            raise InputError(f"{item}: --data {directory} has none of {', '.join(files)}. Name the file: {item}=FILE.")
        return item, Benchmark(str(found), "train", known.problems)
    if known:
        return item, known
    if item.endswith(_FILES):
        return Path(item).stem, Benchmark(item, "train", 0)
    if not item.startswith("task:") and "/" not in item and "." not in item:
        near = difflib.get_close_matches(item, BENCHMARKS, n=1)
        raise InputError(
            f"{item}: no such benchmark{f'; did you mean {near[0]}?' if near else '.'} Known: {', '.join(BENCHMARKS)}. "
            "Else give a .jsonl or .parquet file, task:NAME, or a dataset id USER/NAME."
        )
    return item, Benchmark(item, "train", 0)


def _data(benchmark: Benchmark, settings: Sequence[str]) -> Data:
    template = [] if benchmark.source.startswith("task:") else ["template=boxed"]
    subset = [f"subset={benchmark.subset}"] if benchmark.subset else []
    return parse_data(benchmark.source, [f"split={benchmark.split}", *subset, *template, *settings])
