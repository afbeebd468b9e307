"""Configurations in files and on the command line: YAML plus ``key=value`` overrides in, one typed object out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from opd_jax.config import Config, Data, Strict
from opd_jax.errors import InputError

_M = TypeVar("_M", bound=Strict)


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads a YAML file and applies ``key.path=value`` overrides (values are YAML).

    Raises:
        InputError: unreadable file, unknown key (the nearest valid one is named), wrong type, contradiction.
    """
    return load_yaml(path, Config, overrides)


def load_yaml(path: str | Path, model: type[_M], overrides: list[str] | tuple[str, ...] = ()) -> _M:
    """Reads a YAML file that holds one ``model``; as ``load_config``."""
    try:
        text = Path(path).read_text()
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: cannot read the configuration ({e}). Give the path of a YAML file.") from e
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a mapping of settings, found {type(tree).__name__}")
    for item in overrides:
        _override(tree, item)
    return _validated(model, tree, str(path))


def parse_data(source: str, overrides: list[str] | tuple[str, ...] = ()) -> Data:
    """A data section from the command line: the source and ``data.key=value`` settings (``data.`` may be left out).

    Raises:
        InputError: unknown key or wrong type.
    """
    tree: dict[str, Any] = {"source": source}
    for item in overrides:
        _override(tree, item.removeprefix("data."))
    return _validated(Data, tree, "data")


def parse_config(tree: dict[str, Any], where: str = "configuration") -> Config:
    """Validates a plain dict; all errors are reported together, each with the path of its leaf."""
    return _validated(Config, tree, where)


def parse_list(text: str, where: str) -> list[Any]:
    """Values separated by commas, each in YAML. Raises InputError where they are not valid YAML."""
    return _parse_yaml(f"[{text}]", where)


def check_key(key: str, where: str) -> None:
    """Raises InputError where a dotted name is none of a configuration's; the nearest valid one is named."""
    names = key.split(".")
    for i, name in enumerate(names):
        fields = _fields_at(Config, names[:i])
        if name not in fields:
            raise InputError(f"{where}: {_unknown('.'.join(names[: i + 1]), name, fields)}")


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; ``load_config`` reads it back to an equal object."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


_BOOL = "tag:yaml.org,2002:bool"


def _validated(model: type[_M], tree: dict[str, Any], where: str) -> _M:
    try:
        return model.model_validate(tree)
    except pydantic.ValidationError as e:
        lines = [f"{where}: {e.error_count()} problem(s)"] + [_explain(err, model) for err in e.errors()]
        raise InputError("\n".join(lines)) from e


class _Loader(yaml.SafeLoader):
    """YAML 1.2: 1e-6 is a float and ``off`` a text, as ``alarm: off`` needs (YAML 1.1: a text, a boolean).

    A key that stands twice is refused.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's)
        first: [(tag, pattern) for tag, pattern in found if tag != _BOOL or first in "tTfF"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for twice in {k for k in keys if keys.count(k) > 1}:
            raise yaml.constructor.ConstructorError(None, None, f"key '{twice}' stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what ``_Loader`` would read as a number."""


_EXPONENT = re.compile(r"^[-+]?(?:\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789."))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789."))


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except Exception as e:  # a malformed date, number or tag raises what its constructor raises; deep nesting recurses
        raise InputError(f"{where}: not valid YAML: {str(e) or type(e).__name__}") from e


def _override(tree: dict[str, Any], item: str) -> None:
    key, sep, value = item.partition("=")
    if not sep or not key:
        raise InputError(f"override '{item}': expected key=value, for example optimizer.lr=1e-5")
    *parents, leaf = key.split(".")
    node = tree
    for name in parents:
        child = node.get(name)
        if child is None:
            child = node[name] = {}
        if not isinstance(child, dict):
            raise InputError(f"override '{item}': '{name}' is a value, not a section")
        node = child
    node[leaf] = _parse_yaml(value, f"override '{item}' (quote text that starts with a bracket or holds a colon)")


def _explain(err: Any, root: type[Strict]) -> str:
    path = ".".join(str(p) for p in err["loc"]) or "(top level)"
    if err["type"] == "extra_forbidden":
        *parents, name = err["loc"]
        fields = _fields_at(root, parents)
        return f"  {_unknown(path, str(name), fields)}"
    if err["type"] == "missing":
        return f"  {path}: required, but not given"
    if err["type"] == "model_type":
        return f"  {path}: expected a section of settings, found {_shown(err['input'])}"
    message = err["msg"].removeprefix("Value error, ")
    found = "" if err["type"] == "value_error" else f" (found {_shown(err['input'])})"
    return f"  {path}: {message}{found}"


def _unknown(path: str, name: str, fields: list[str]) -> str:
    near = difflib.get_close_matches(name, fields, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else f"; expected one of {', '.join(sorted(fields))}"
    return f"{path}: unknown key{hint}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"


def _fields_at(model: Any, path: list[Any]) -> list[str]:
    for name in path:
        if name in model.model_fields:  # else the key of a mapping, as the name of a part of data.mix
            inner = _types_in(model.model_fields[name].annotation)
            model = next((t for t in inner if hasattr(t, "model_fields")), model)
    return list(model.model_fields)


def _types_in(annotation: Any) -> Iterator[Any]:
    yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _types_in(inner)
