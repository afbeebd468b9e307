"""What an exported student says about itself: a model card for the Hugging Face Hub and its generation settings."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from etils import epath

from opd_jax.models.hf import read_json
from opd_jax.stores import local_directory
from opd_jax.tracking.labels import axis_label, format_value, in_order
from opd_jax.tracking.report import gap_recovery
from opd_jax.tracking.run_dir import Row, RunDir, read_rows

TAG = "opd-jax"
RECORD = "opd_import.json"  # of ``opd import``
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/")
_TAGS = {"opd": ["distillation", "on-policy-distillation"], "sft": ["sft"], "grpo": ["grpo", "reinforcement-learning"]}
_NOT_SCORES = {"step", "problems", "samples"}


def export_files(run: RunDir, step: int, stops: Sequence[int]) -> dict[str, str]:
    """README.md and generation_config.json for the student of a run after ``step``: name → text.

    ``stops``: ids that end a response.
    """
    config = yaml.safe_load(run.config.read_text())
    settings = generation_config(config) | {"eos_token_id": list(stops)}
    return {"README.md": model_card(run, config, step), "generation_config.json": json.dumps(settings, indent=2) + "\n"}


def generation_config(config: Row) -> Row:
    """The student's own, with the sampling of the run's evaluation and its longest response.

    ``config`` is that of the run, as a plain dict.
    """
    file = local_directory(config["student"]["path"]) / "generation_config.json"
    evaluation, longest = config["evaluation"], config["rollout"]["max_response"]
    sampled = evaluation["temperature"] > 0
    settings = read_json(file) if file.is_file() else {}
    for name in ("temperature", "top_p", "top_k", "max_length"):
        settings.pop(name, None)
    settings |= {"do_sample": sampled, "max_new_tokens": evaluation["max_response"] or longest}
    if sampled:
        settings |= {"temperature": evaluation["temperature"], "top_p": evaluation["top_p"], "top_k": 0}
    return settings


def model_card(run: RunDir, config: Row, step: int) -> str:
    """Markdown with the front matter that the Hub reads: models, settings, scores before and after, hardware.

    Local paths are named by their last part: a card is made to be published.
    """
    student, teacher = config["student"]["path"], (config["teacher"] or {}).get("path")
    base, sources = base_model(student), _sources(config["data"])
    tags = [TAG, "jax", *_TAGS[config["kind"]]]
    front: Row = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    if base:
        front |= {"base_model": base, "base_model_relation": "finetune"}
    if published := [source for source in sources if _is_hub_id(source)]:
        front["datasets"] = published
    name = run.root.name or "student"
    of_teacher = f"`{base_model(teacher) or _shown(teacher)}`"
    of_data = " and ".join(f"`{_shown(source)}`" for source in sources)
    how = {
        "opd": f"distilled from {of_teacher} on its own samples (on-policy distillation, opd-jax)",
        "sft": f"fine-tuned on {of_data} (SFT, opd-jax)",
        "grpo": f"trained by rewards of its own samples (GRPO, opd-jax) on {of_data}",
    }[config["kind"]]
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False) + "---",
        f"# {name}",
        f"`{base or _shown(student)}` {how}, after {step:,} steps.",
        _scores(run, step, config),
        "## Training\n\n" + _table(["", ""], _settings(run, config, step)),
        "## Use\n\n" + _USE,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this directory, or the id of this repository
model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
```

`generation_config.json` holds the sampling settings of the evaluation above."""


def base_model(path: str | None) -> str | None:
    """The Hub id of the model in a local directory, if its files tell: from `opd import`, the Hub's cache, or a card
    that this package wrote."""
    if path is None:
        return None
    if found := _HUB_CACHE.search(path):
        return f"{found[1]}/{found[2]}"
    directory = local_directory(path)
    record, card = directory / RECORD, directory / "README.md"
    if record.is_file():
        written = read_json(record)
        return written["source"] if written.get("from_hub") else None
    front = _front_matter(card) if card.is_file() else {}
    return front.get("base_model") if TAG in front.get("tags", []) else None


def _front_matter(card: Path) -> Row:
    head, *_ = card.read_text(encoding="utf-8", errors="replace").removeprefix("---\n").split("\n---", 1)
    try:
        tree = yaml.safe_load(head)
    except yaml.YAMLError:  # a card from elsewhere
        return {}
    return tree if isinstance(tree, dict) else {}


def _scores(run: RunDir, step: int, config: Row) -> str:
    """Before, after, teacher; nothing where the run was not evaluated."""
    rows = [row for row in read_rows(run.evaluations) if row["step"] <= step]
    students = [row for row in rows if row.get("who") != "teacher"]
    if not students:
        return ""
    first, last = students[0], students[-1]
    teacher = next((row for row in reversed(rows) if row.get("who") == "teacher"), {})
    shown = [first, last, teacher] if first is not last else [first, teacher]
    heads = ["", "before", f"after (step {last['step']:,})"] if first is not last else ["", f"step {first['step']:,}"]
    names = in_order(k for row in shown for k, v in row.items() if _is_score(k, v))
    table = [[axis_label(n, config["objective"]["k"]), *(_cell(row, n) for row in shown)] for n in names]
    if first is not last and (rate := gap_recovery(first, last, teacher)):
        table.append(["gap recovery rate", "–", format_value(rate), "–"])
    data, settings = config["evaluation"]["data"] or {}, config["evaluation"]
    each = f", {last['samples']} samples each" if last.get("samples", 1) > 1 else ""
    note = (
        f"{last.get('problems')} problems of {', '.join(f'`{_shown(x)}`' for x in _sources(data))} "
        f"({data.get('split')}){each}, "
        f"temperature {settings['temperature']}, top-p {settings['top_p']}. "
        "± is one standard error."
    )
    if not teacher:
        return f"## Scores\n\n{_table(heads, [row[: len(heads)] for row in table])}\n\n{note}"
    return f"## Scores\n\n{_table([*heads, 'teacher'], table)}\n\n{note}"


def _is_score(name: str, value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and name not in _NOT_SCORES and not name.endswith("_se") and "/" not in name


def _cell(row: Row, name: str) -> str:
    error = row.get(f"{name}_se")
    return format_value(row.get(name) if error is None else (row.get(name), error))


def _settings(run: RunDir, config: Row, step: int) -> list[list[str]]:
    rollout, optimizer, data = config["rollout"], config["optimizer"], config["data"]
    start = json.loads(run.environment.read_text())[-1] if run.environment.exists() else {}
    packages = start.get("packages", {})
    kinds = {start.get("cpu", kind) if kind == "cpu" else kind: n for kind, n in start.get("devices", {}).items()}
    devices = ", ".join(f"{n} × {kind}" for kind, n in kinds.items())
    teacher = (config["teacher"] or {}).get("path")
    limit = f", first {data['limit']:,} rows" if data["limit"] else ""
    facts = {
        "student": base_model(config["student"]["path"]) or _shown(config["student"]["path"]),
        "teacher": teacher and (base_model(teacher) or _shown(teacher)),
        "objective": "cross-entropy (SFT)" if config["kind"] == "sft" else _objective(config),
        "data": f"{' + '.join(map(_shown, _sources(data)))} ({data['split']}{limit}), "
        f"template {json.dumps(data['template'])}",
        "steps": f"{step:,} of {config['steps']:,}",
        "batch": f"{rollout['prompts']} prompts × {rollout['samples']}, at most {rollout['max_response']:,} new tokens",
        "optimizer": f"AdamW, rate {optimizer['lr']:g} ({optimizer['schedule']}, {optimizer['warmup']} steps warm-up)",
        "compute": f"{config['dtype']}, float32 master weights",
        "hardware": devices or None,
        "seed": config["seed"],
        "software": ", ".join(f"{name} {packages[name]}" for name in ("opd-jax", "jax") if packages.get(name)),
        "revision": start.get("git_revision"),
    }
    return [[name, str(value)] for name, value in facts.items() if value not in (None, "")]


def _objective(config: Row) -> str:
    objective = config["objective"]
    name, k = objective["name"], objective["k"]
    reward = ", ".join(f"{weight:g} × {term}" for term, weight in (config.get("reward") or {}).get("terms", {}).items())
    if not config["teacher"]:
        return f"policy gradient of the reward {reward}"
    detail = {
        "sampled": "reverse KL, policy gradient on sampled tokens",
        "full": f"{objective['divergence']} KL over the whole vocabulary",
        "topk": f"{objective['divergence']} KL over the {objective['support']}'s top {k}",
        "topk_reference": f"published top-{k} objective",
    }[name].replace("jsd KL", "JSD")
    return f"{name}: {detail}" + (f", and the reward {reward}" if reward else "")


def _sources(data: Row) -> list[str]:
    return [part["source"] for part in (data.get("mix") or {}).values()] or ([data["source"]] if data else [])


def _is_hub_id(source: str) -> bool:
    looks = bool(_HUB_ID.fullmatch(source)) and not source.endswith((".jsonl", ".parquet"))
    return looks and not Path(source).exists()


def _shown(path: str | None) -> str:
    """A Hub id or a task as it is; of a path its last part."""
    text = str(path)
    return text if ":" in text.split("/")[0] or _is_hub_id(text) else epath.Path(text).name


def _table(heads: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(heads), "|" + "---|" * len(heads), *(line(row) for row in rows)])
