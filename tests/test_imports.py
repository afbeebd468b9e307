"""The import direction of the package, and what no module may do; read from the source, so nothing is imported."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "opd_jax"

BASE = {"errors", "types", "config", "config_files", "mesh", "stores", "hosts"}
EDGE = {"data", "checkpoints", "tracking"}
SCORING = BASE | {"models", "sampling", "losses"}
# A part of the package → the parts that it may import (itself always). A new part has to be given its place here.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "types": set(),
    "config": {"errors"},
    "config_files": {"errors", "config"},
    "mesh": {"errors"},
    "stores": {"errors"},
    "hosts": {"errors"},
    "models": BASE,
    "sampling": BASE | {"models"},
    "losses": BASE | {"models"},
    "teacher": SCORING,
    "objectives": SCORING | {"teacher"},
    "data": BASE,
    "tracking": BASE,
    "checkpoints": BASE | {"models", "data", "tracking"},
    "generate": BASE | {"models", "sampling", "data", "tracking"},
    "evaluation": SCORING | {"teacher", "data", "tracking", "generate"},
    "analysis": SCORING | {"teacher", "evaluation", "data", "tracking", "generate"},
    "training": SCORING | EDGE | {"teacher", "objectives", "evaluation"},
}
# these may import everything, and only they are imported by each other
TOP = {"cli", "commands", "compare", "demo", "paper", "plan", "recipe"}
for top in TOP:
    MAY_IMPORT[top] = set(MAY_IMPORT) | TOP
MAY_IMPORT["__init__"] = set()  # `import opd_jax` stays light

FORBIDDEN_MODULES = {"torch", "pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(name: str) -> str:
    """opd_jax.models.decoder → models."""
    return name.split(".")[1] if "." in name else "__init__"


def imported(tree: ast.Module) -> Iterator[str]:
    """Every absolute module name that a file imports, at its top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            module = node.module or ""
            yield from (f"{module}.{alias.name}" for alias in node.names)


def wrong_imports(part: str, source: str) -> list[str]:
    names = [name for name in imported(ast.parse(source)) if name.split(".")[0] == "opd_jax"]
    return [n for n in names if n != "opd_jax.__version__" and part_of(n) not in MAY_IMPORT[part] | {part}]


def safe_loaders(tree: ast.Module) -> set[str]:
    """Classes of the file that derive from yaml's SafeLoader."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return {c.name for c in classes if any(ast.unparse(b).endswith("SafeLoader") for b in c.bases)}


def unsafe(source: str, in_mesh: bool = False) -> list[str]:
    """What a file does that it must not, as source text."""
    tree = ast.parse(source)
    found = [name for name in imported(tree) if name.split(".")[0] in FORBIDDEN_MODULES]
    found += [name for name in imported(tree) if name.endswith(".PartitionSpec") and not in_mesh]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in FORBIDDEN_CALLS or name in ("yaml.unsafe_load", "yaml.full_load", "yaml.load_all"):
            found.append(name)
        if name == "yaml.load" and keywords.get("Loader") not in safe_loaders(tree) | {"yaml.SafeLoader"}:
            found.append(name)
        if keywords.get("trust_remote_code", "False") != "False" or keywords.get("allow_pickle", "False") != "False":
            found.append(ast.unparse(node))
        if name.endswith("PartitionSpec") and not in_mesh:
            found.append(name)
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_module(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert part in MAY_IMPORT, f"{part}: new part of the package; give it its place in MAY_IMPORT"
    source = path.read_text()
    assert not wrong_imports(part, source), "imports against the direction"
    assert not unsafe(source, in_mesh=path.name == "mesh.py")


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("models", "from opd_jax.losses import distillation_loss"),
        ("losses", "from opd_jax.sampling import law"),
        ("evaluation", "def f():\n    import opd_jax.training.loop"),
        ("data", "from opd_jax.training.setup import Setup"),
        ("training", "from opd_jax import cli"),
        ("training", "from opd_jax.analysis.prune import layers_to_drop"),
        ("__init__", "from opd_jax.mesh import Layout"),
    ],
)
def test_wrong_direction_is_noticed(part: str, source: str) -> None:
    assert wrong_imports(part, source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch",
        "from torch import nn",
        "def f():\n    import pickle",
        "eval(text)",
        "exec(text)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "class Mine(yaml.Loader): pass\nyaml.load(text, Loader=Mine)",
        "yaml.unsafe_load(text)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=True)",
        "np.load(path, allow_pickle=True)",
        "jax.sharding.PartitionSpec('data')",
        "from jax.sharding import PartitionSpec as P",
    ],
)
def test_unsafe_code_is_noticed(source: str) -> None:
    assert unsafe(source)


def test_harmless_code_is_not() -> None:
    source = """
        class Mine(yaml.SafeLoader): pass
        yaml.load(text, Loader=Mine)
        jax.eval_shape(f, x)
        f.lower(x).compile()
        re.compile(text)
        load(path, trust_remote_code=False)
    """
    assert not unsafe(textwrap.dedent(source))
