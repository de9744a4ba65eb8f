"""Dependencies point one way: the engine knows no defence, and defences know each other through the registry alone."""

import ast
from pathlib import Path

import pytest

from ensdef.registry import METHODS

ROOT = Path(__file__).parent.parent
ENGINE = sorted((ROOT / "ensdef").rglob("*.py"))
#: Names of defences that are also those of combiners.
SHARED = {"max", "avg"}


@pytest.mark.parametrize("path", ENGINE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_engine_names_and_imports_no_defence(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not texts & (set(METHODS.names()) - SHARED)
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not [name for name in imported if name.startswith(("ensdef.methods", "ensdef.attacks"))]


@pytest.mark.parametrize("path", sorted((ROOT / "methods").glob("[!_]*.py")), ids=lambda path: path.name)
def test_a_defence_imports_no_other(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    siblings = {
        node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "methods" in (node.module or "")
    }
    assert all(name.rpartition(".")[2].startswith("_") for name in siblings), "shared terms live in files named _..."
