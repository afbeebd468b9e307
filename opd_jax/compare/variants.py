"""The variants of a comparison: the product of the --vary lists, less what would be one variant under two names."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opd_jax.config import Config
from opd_jax.config_files import check_key, parse_config, parse_list
from opd_jax.errors import InputError

Settings = dict[str, Any]  # dotted key → value

# What may differ: the update, which comes after the rollouts of a step. All else would change what is sampled, from
# whom, or what is measured.
MAY_VARY = ("objective", "positions", "reward", "optimizer", "updates", "pack", "micro_batch", "remat")
_INSTEAD = {
    "seed": "the seeds are those of --seeds",
    "run_dir": "every run gets its own directory below --out",
    "steps": "all variants take the same steps; the curves show each of them",
    "metrics_k": "the overlap is measured alike for all; set it as metrics_k=16, for all",
}
_TOPK = ("topk", "topk_reference")

# Keys that change nothing under some objectives (docs/losses.md), and when they do change it; all others always do.
# k also sizes the lists of the overlap metrics, which a comparison sets for all variants alike (``metrics_k``).
EFFECTIVE: Mapping[str, Callable[[Settings], bool]] = {
    "objective.k": lambda o: o["name"] in _TOPK,
    "objective.support": lambda o: o["name"] in _TOPK,
    "objective.normalise": lambda o: o["name"] in _TOPK,
    "objective.tail": lambda o: o["name"] == "topk",
    "objective.divergence": lambda o: o["name"] in ("full", "topk"),
    "objective.beta": lambda o: o["name"] in ("full", "topk") and o["divergence"] == "jsd",
    "objective.alpha": lambda o: o["name"] in ("full", "topk") and o["divergence"] == "skew",
}


@dataclasses.dataclass(frozen=True)
class Variant:
    name: str  # what it alone has, as "topk k=4"
    directory: str
    settings: Settings  # the varied keys that have an effect in it
    config: Config  # without its own run_dir and seed


@dataclasses.dataclass(frozen=True)
class Dropped:
    settings: Settings
    why: str


def make_variants(base: Config, vary: Sequence[str]) -> tuple[list[Variant], list[Dropped]]:
    """Variants in the order of the lists, the last key fastest, and the combinations that are none.

    Keys without effect keep the value of ``base``; of combinations that are then alike the first one stays. One that a
    configuration refuses is dropped, too, if each of its values stands in another that is accepted.

    Raises:
        InputError: no list, a key that is unknown, stands twice or in another, may not vary or has a single value, a
            value that no combination accepts, or fewer than two variants.
    """
    lists = dict(_parsed(item) for item in vary)
    if len(lists) < len(vary) or not lists:
        twice = next((item for i, item in enumerate(vary) if _key(item) in map(_key, vary[:i])), None)
        raise InputError(
            f"--vary {twice}: the key has a list already. Put all values into one."
            if twice
            else "--vary: give what is to be compared, as --vary objective.name=full,topk"
        )
    for inner, outer in itertools.permutations(lists, 2):
        if inner.startswith(f"{outer}."):
            raise InputError(f"--vary {outer}: {inner}, a part of it, has a list, too. Vary one of them.")
    base = base.model_copy(update={"metrics_k": base.overlap_k})
    combinations = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    _check_values(base, lists, combinations)
    kept: dict[str, tuple[Settings, Config]] = {}
    dropped: list[Dropped] = []
    for settings in combinations:
        active = {key: value for key, value in settings.items() if _has_effect(base, settings, key)}
        try:
            config = _with(base, active)
        except InputError as e:
            dropped.append(Dropped(settings, _reason(e)))
            continue
        same = json.dumps(config.model_dump(mode="json"), sort_keys=True)
        if same in kept:
            idle = ", ".join(key for key in settings if key not in active)
            why = f"{idle} has no effect there" if idle else "the same values"
            dropped.append(Dropped(settings, f"alike {_name(kept[same][0], lists)}: {why}"))
        else:
            kept[same] = active, config
    if len(kept) < 2:
        raise InputError(
            f"--vary {' '.join(vary)}: all combinations come to one variant. Vary a key that has an effect."
        )
    return _named(list(kept.values()), lists), dropped


def shown(settings: Settings) -> str:
    return " ".join(f"{key}={_text(value)}" for key, value in settings.items())


def _key(item: str) -> str:
    return item.partition("=")[0]


def _parsed(item: str) -> tuple[str, list[Any]]:
    key, sep, text = item.partition("=")
    if not sep or not key:
        raise InputError(f"--vary {item}: expected key=value,value,…, for example objective.k=1,4,16")
    check_key(key, f"--vary {item}")
    if key.split(".")[0] not in MAY_VARY:
        why = _INSTEAD.get(key, "it would change what is sampled, from whom, or what is measured")
        sections = ", ".join(f"{name}.…" if name in MAY_VARY[:4] else name for name in MAY_VARY)
        raise InputError(f"--vary {item}: {key} may not differ between variants: {why}. These may: {sections}.")
    values = parse_list(text, f"--vary {item}")
    if len({json.dumps(value, sort_keys=True, default=str) for value in values}) < 2:
        raise InputError(
            f"--vary {item}: one value. Give two or more to compare, as {key}=A,B; or set it for all variants, {item}"
        )
    return key, values


def _check_values(base: Config, lists: Mapping[str, list[Any]], combinations: list[Settings]) -> None:
    """Every value has to be right somewhere: a slip of the pen is no combination to be dropped."""
    refused: list[tuple[Settings, InputError]] = []
    accepted: list[Settings] = []
    for settings in combinations:
        try:
            _with(base, settings)
            accepted.append(settings)
        except InputError as e:
            refused.append((settings, e))
    for key, values in lists.items():
        for value in values:
            if not any(settings[key] is value for settings in accepted):  # not ==: nan is no equal of itself
                raise next(e for settings, e in refused if settings[key] is value)


def _has_effect(base: Config, settings: Settings, key: str) -> bool:
    objective = {name: settings.get(f"objective.{name}", value) for name, value in base.objective.model_dump().items()}
    return key not in EFFECTIVE or EFFECTIVE[key](objective)


def _with(base: Config, settings: Settings) -> Config:
    tree = base.model_dump()
    for key, value in settings.items():
        *parents, leaf = key.split(".")
        node = tree
        for name in parents:
            node[name] = node[name] or {}
            node = node[name]
        node[leaf] = value
    return parse_config(tree, f"variant {shown(settings)}")


def _reason(error: InputError) -> str:
    """The first problem, without the heading."""
    lines = str(error).splitlines()
    return "refused: " + (lines[1] if len(lines) > 1 else lines[0]).strip().removeprefix("(top level): ")


def _named(found: Sequence[tuple[Settings, Config]], lists: Mapping[str, Any]) -> list[Variant]:
    variants: list[Variant] = []
    for settings, config in found:
        name = _name(settings, lists)
        directory = re.sub(r"[^A-Za-z0-9.+-]+", "-", name).strip("-.")[:80]
        if directory in [v.directory for v in variants] or not directory:
            directory = f"{directory}-{len(variants) + 1}"
        variants.append(Variant(name, directory, settings, config))
    return variants


def _name(settings: Settings, lists: Mapping[str, Any]) -> str:
    """The values, each behind the last part of its key, or behind all of it where two keys end alike."""
    leaves = [key.rpartition(".")[2] for key in lists]
    parts = []
    for key, value in settings.items():
        leaf = key.rpartition(".")[2]
        label = key if leaves.count(leaf) > 1 else leaf
        parts.append(_text(value) if key == "objective.name" else f"{label}={_text(value)}")
    return " ".join(parts) or "as configured"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
