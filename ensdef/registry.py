"""Names to plug-ins, found without importing them.

One :class:`Registry` a kind. A name is looked up among what was registered already, then in the files of the
kind's package (their decorators are read from the syntax tree, so a broken neighbour blocks nobody), then among the
entry points of other installed distributions.

A name that ends in ``.*`` is a family: a function that makes the plug-in for what stands after the dot, such as a class
of a wrapped library. ``names`` leaves families out, because nobody can list what they hold; ``listings`` shows them.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from ensdef.errors import PluginError, UsageError, suggest

T = TypeVar("T")
_NAME = re.compile(r"[a-z_][a-z0-9_.]*(\.\*)?\Z")
#: How the name of a family ends: ``library.*`` makes ``library.Anything``.
_FAMILY = ".*"


@dataclass(frozen=True)
class Listing:
    """What can be said of a plug-in without importing it."""

    name: str
    summary: str
    citation: str
    origin: str


class Registry(Generic[T]):
    """The plug-ins of one kind (``"method"``), living in one package (``"ensdef.methods"``)."""

    def __init__(self, kind: str, package: str, decorator: str, group: str | None = None) -> None:
        self.kind = kind
        self.package = package
        self.decorator = decorator
        self.group = group
        self._registered: dict[str, T] = {}
        self._made: dict[str, T] = {}
        #: whether a plug-in of another distribution was imported
        self.loaded_others = False

    def register(self, name: str, check: Callable[[T], None] | None = None) -> Callable[[T], T]:
        """Decorator: ``@register_defense("soe")``.

        Raises:
            PluginError: the name is taken by another class, or ``check`` refuses the object.
        """

        def add(plugin: T) -> T:
            if not _NAME.match(name) or not any(char.isalpha() for char in name):
                raise PluginError(f"{name!r} is no {self.kind} name; use lower-case letters, digits and _")
            if check is not None:
                check(plugin)
            owner = self._registered.get(name)
            if owner is not None and _identity(owner) != _identity(plugin):
                raise PluginError(
                    f"{self.kind} {name!r} is already registered by {_identity(owner)}; "
                    f"{_identity(plugin)} must take another name"
                )
            module = getattr(plugin, "__module__", "")
            if owner is None and name in self._files and module != f"{self.package}.{self._files[name].stem}":
                raise PluginError(
                    f"{self.kind} {name!r} is already taken by the built-in {self._files[name].name}; "
                    f"{_identity(plugin)} must take another name"
                )
            self._registered[name] = plugin
            return plugin

        return add

    def get(self, name: str) -> T:
        """The plug-in called ``name``, importing its file or making it by its family if need be.

        Raises:
            UsageError: no such name (the nearest are suggested).
            PluginError: its file does not import or does not register the name.
        """
        if name in self._made:
            return self._made[name]
        if name.endswith(_FAMILY):
            raise UsageError(f"{name} stands for many; put a name in place of the star")
        family = name.partition(".")[0] + _FAMILY
        if "." in name and not self._knows(name) and self._knows(family):
            maker = cast(Callable[[str], T], self._load(family))
            self._made[name] = maker(name.partition(".")[2])
            return self._made[name]
        return self._load(name)

    def _knows(self, name: str) -> bool:
        return name in self._registered or name in self._files or name in self._entry_points

    def _load(self, name: str) -> T:
        if name not in self._registered:
            self._refuse_clash(name)
            if name in self._files:
                self._import(f"{self.package}.{self._files[name].stem}", name)
            elif name in self._entry_points:
                point = self._entry_points[name]
                self.loaded_others = True
                plugin = self._import(point.module, name, point)
                # a class that does not register itself is registered by its entry point; a module is not a plug-in
                if inspect.isclass(plugin) and name not in self._registered:
                    self._registered[name] = cast(T, plugin)
            else:
                raise UsageError(suggest(self.kind, name, self._all()))
        if name not in self._registered:
            raise PluginError(
                f"the file of {self.kind} {name!r} was imported but did not register it; "
                f"decorate its class with @{self.decorator}({name!r})"
            )
        return self._registered[name]

    def at_hand(self, name: str) -> T | None:
        """The plug-in if it is built in or registered already; None for one of another distribution, or a broken file:
        looking at a list must not run other people's code.
        """
        if name not in self._registered and name not in self._files:
            return None
        try:
            return self.get(name)
        except UsageError:
            return None

    def names(self) -> list[str]:
        """Every known name but those of families, sorted, without importing any plug-in."""
        return [name for name in self._all() if not name.endswith(_FAMILY)]

    def _all(self) -> list[str]:
        return sorted({*self._registered, *self._files, *self._entry_points})

    def listings(self) -> Iterator[Listing]:
        """Name, first docstring line and citation of every plug-in and family, read from the sources."""
        for name in self._all():
            if name in self._files:
                yield _listing_from_source(self._files[name], name, self.decorator)
            elif name in self._registered:
                doc = (getattr(self._registered[name], "__doc__", "") or "").strip()
                module = sys.modules.get(getattr(self._registered[name], "__module__", ""))
                yield Listing(
                    name,
                    doc.partition("\n")[0],
                    _citation(module.__doc__ if module else None),
                    _identity(self._registered[name]),
                )
            else:
                point = self._entry_points[name]
                yield Listing(name, "", "", f"{point.value} ({point.dist.name if point.dist else 'entry point'})")

    def _refuse_clash(self, name: str) -> None:
        owners = [point.value for point in (entry_points(group=self.group) if self.group else ()) if point.name == name]
        if name in self._files:
            owners.append(self._files[name].name)
        if len(set(owners)) > 1:
            raise PluginError(
                f"{self.kind} {name!r} is claimed by {' and by '.join(sorted(set(owners)))}; "
                "uninstall one, or have it renamed"
            )

    def _import(self, module: str, name: str, point: EntryPoint | None = None) -> Any:
        try:
            return point.load() if point is not None else importlib.import_module(module)
        except UsageError:
            raise
        except Exception as error:
            raise PluginError(
                f"{self.kind} {name!r} cannot be used: importing {module} failed with {type(error).__name__}: {error}"
            ) from error

    @cached_property
    def _files(self) -> dict[str, Path]:
        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            raise UsageError(f"{self.package} is not installed; run `pip install -e .` in the checkout")
        found: dict[str, Path] = {}
        for folder in spec.submodule_search_locations:
            for path in sorted(Path(folder).glob("*.py")):
                if not path.name.startswith("_"):
                    for name in registered_names(path, self.decorator):
                        found.setdefault(name, path)
        return found

    @cached_property
    def _entry_points(self) -> dict[str, EntryPoint]:
        if self.group is None:
            return {}
        return {point.name: point for point in entry_points(group=self.group)}


#: What :func:`load_plugin` imported (absolute paths of files, names of modules), and what was registered by it.
_LOADED: dict[str, dict[tuple[str, str], Any]] = {}


def loaded_plugins() -> tuple[str, ...]:
    """What another process must load to know the same plug-ins; in order, without those that were forgotten since."""
    present = _registrations()
    return tuple(
        where for where, plugins in _LOADED.items() if all(present.get(key) is plugins[key] for key in plugins)
    )


def others_loaded() -> bool:
    """Whether plug-ins of other distributions were imported through their entry points."""
    return any(registry.loaded_others for registry in (METHODS, ATTACKS))


def _registrations() -> dict[tuple[str, str], Any]:
    return {
        (registry.kind, name): plugin
        for registry in (METHODS, ATTACKS, ARCHITECTURES, DATASETS, MEASUREMENTS)
        for name, plugin in registry._registered.items()
    }


def load_plugin(where: str) -> None:
    """Import a plug-in file (``my_defense.py``) or module (``package.module``), so that it registers itself.

    Raises:
        PluginError: missing, does not import, or registers a taken name.
    """
    path = Path(where)
    if path.suffix == ".py" or os.path.isfile(path):
        if not os.path.isfile(path):
            raise PluginError(f"--plugin {where}: no such file")
        digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
        module_name, there = f"ensdef_plugin_{path.resolve().stem}_{digest}", str(path.resolve())
        known = sys.modules.get(module_name)
        if known is not None and getattr(known, "__file__", None) == str(path.resolve()):
            return
        spec = importlib.util.spec_from_file_location(module_name, path.resolve())
        if spec is None or spec.loader is None:
            raise PluginError(f"--plugin {where}: not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        load: Callable[[], Any] = lambda: spec.loader.exec_module(module)  # type: ignore[union-attr]  # noqa: E731
    else:
        module_name = there = where
        load = lambda: importlib.import_module(where)  # noqa: E731
    before = _registrations()
    try:
        load()
    except UsageError as error:
        sys.modules.pop(module_name, None)
        raise PluginError(f"--plugin {where}: {error}") from error
    except Exception as error:
        sys.modules.pop(module_name, None)
        raise PluginError(f"--plugin {where} does not import: {type(error).__name__}: {error}") from error
    new = {key: plugin for key, plugin in _registrations().items() if key not in before}
    _LOADED[there] = {**_LOADED.get(there, {}), **new}


def registered_names(path: Path, decorator: str) -> list[str]:
    """The string literals of ``@decorator("...")`` in a source file; empty for a file that does not parse."""
    return [name for name, _ in _decorated(path, decorator)]


def _decorated(path: Path, decorator: str) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef]]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):  # no UTF-8; null bytes before Python 3.11.4
        # its stem stays listed, so that asking for it tells what is wrong with it
        if decorator:
            yield path.stem, ast.parse("class broken: 'does not parse'").body[0]  # type: ignore[misc]
        return
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            for call in node.decorator_list:
                if (
                    isinstance(call, ast.Call)
                    and call.args
                    and isinstance(call.args[0], ast.Constant)
                    and getattr(call.func, "attr", getattr(call.func, "id", None)) == decorator
                ):
                    yield str(call.args[0].value), node


def _listing_from_source(path: Path, name: str, decorator: str) -> Listing:
    node = dict(_decorated(path, decorator))[name]
    summary = (ast.get_docstring(node) or "").partition("\n")[0]
    try:
        citation = _citation(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))))
    except (SyntaxError, ValueError):  # no UTF-8; null bytes before Python 3.11.4
        citation = ""
    return Listing(name, summary, citation, path.name)


def _citation(module_doc: str | None) -> str:
    """The first docstring paragraph of a plug-in file names title, authors, venue and year."""
    return " ".join((module_doc or "").strip().partition("\n\n")[0].split())


def _identity(plugin: Any) -> str:
    return f"{getattr(plugin, '__module__', '?')}.{getattr(plugin, '__qualname__', plugin)}"


METHODS: Registry[Any] = Registry("method", "ensdef.methods", "register_defense", "ensdef.methods")
ATTACKS: Registry[Any] = Registry("attack", "ensdef.attacks", "register_attack", "ensdef.attacks")
ARCHITECTURES: Registry[Any] = Registry("architecture", "ensdef.architectures", "register_architecture")
DATASETS: Registry[Any] = Registry("data set", "ensdef.datasets", "register_dataset")
MEASUREMENTS: Registry[Any] = Registry("measurement", "ensdef.measures", "register_measure")
