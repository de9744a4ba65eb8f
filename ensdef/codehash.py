"""A fingerprint of what a plug-in computes: its syntax tree without comments and docstrings.

Editing a comment keeps every cached result; editing a formula does not.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

#: Raised by hand whenever the engine may give other numbers for the same specification.
NUMERICS = 1
#: The one part of the engine that is hashed where a plug-in imports from its modules: formulas that measurements are.
_FORMULAS = "ensdef.diagnostics."


def code_hash(plugin: Any) -> str:
    """First 16 hex digits of the SHA-256 over the plug-in's module, those it derives from, and what they import."""
    found: dict[str, ModuleType] = {}
    for cls in getattr(plugin, "__mro__", (plugin,)):
        root, _, rest = cls.__module__.partition(".")
        if root in ("torch", "builtins", "abc", "typing") or (root == "ensdef" and "." not in rest):
            continue  # the engine's own classes are covered by NUMERICS
        if cls.__module__ not in found:
            _with_siblings(sys.modules[cls.__module__], found)
    digest = hashlib.sha256(f"numerics {NUMERICS}".encode())
    for part in sorted(found.values(), key=lambda item: item.__name__):
        digest.update(_normalised(_source(part)).encode())
    return digest.hexdigest()[:16]


def _with_siblings(module: ModuleType, found: dict[str, ModuleType]) -> dict[str, ModuleType]:
    """The module and, recursively, what it imports from its own package (shared code of a family of plug-ins) and of
    the diagnostics' formulas.
    """
    found[module.__name__] = module
    package = module.__name__.rpartition(".")[0]
    if package == "ensdef":
        return found
    for name in _imported(_source(module), package):
        own = bool(package) and name.startswith(package + ".")
        if (own or name.startswith(_FORMULAS)) and name not in found:
            try:
                sibling = importlib.import_module(name)
            except ModuleNotFoundError:
                continue  # the name of something inside a module, not of a module
            _with_siblings(sibling, found)
        elif not package and name not in found and _beside(sys.modules.get(name), module):
            _with_siblings(sys.modules[name], found)
    return found


@cache
def _imported(source: str, package: str) -> tuple[str, ...]:
    """Names that a module of a package imports, and those of what it imports from them."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            base = (
                f"{package}.{node.module}"
                if node.level and node.module
                else (package if node.level else node.module or "")
            )
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return tuple(names)


def _beside(other: ModuleType | None, module: ModuleType) -> bool:
    """Whether two modules are files of one folder (a plug-in given as a file, and its helpers)."""
    paths = [getattr(part, "__file__", None) for part in (other, module)]
    return all(paths) and Path(str(paths[0])).parent == Path(str(paths[1])).parent


@cache
def _normalised(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
            and isinstance(body[0].value.value, str)
        ):
            node.body = body[1:]
    return ast.unparse(tree)  # ast.dump differs between versions of Python


def _source(module: ModuleType) -> str:
    try:
        return inspect.getsource(module)
    except (OSError, TypeError):
        return module.__name__  # defined at a prompt: no file to read
