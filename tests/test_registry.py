"""Finding plug-ins by name: in a package's files, in other distributions, in a file of the user's."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from ensdef.errors import PluginError, UsageError
from ensdef.registry import Registry, load_plugin

_numbers = count()

PACKAGE = '''
"""A throw-away package of plug-ins."""
registry = None


def register_toy(name):
    return registry.register(name)
'''

ALPHA = '''
"""On alphas.

A. Author, some venue, 2020. The text
is never read below the first paragraph.
"""
from {package} import register_toy


@register_toy("alpha")
class Alpha:
    """The first letter.

    More about it.
    """
'''


class Toys:
    """A package of plug-ins in a folder of its own, and the registry over it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.package = f"toys_of_test_{next(_numbers)}"
        self.folder = root / self.package
        self.write("__init__", PACKAGE)

    def write(self, stem: str, source: str) -> Path:
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"{stem}.py"
        path.write_text(textwrap.dedent(source).lstrip().replace("{package}", self.package), encoding="utf-8")
        importlib.invalidate_caches()
        return path

    def plugin(self, stem: str, name: str, cls: str = "Toy", top: str = "") -> Path:
        """A file with one class registered as ``name``; ``top`` runs first."""
        return self.write(
            stem,
            f"from {self.package} import register_toy\n{top}\n@register_toy({name!r})\nclass {cls}:\n    pass\n",
        )

    def registry(self, group: str | None = None) -> Registry[Any]:
        """A registry that looks at the files now in the package."""
        registry: Registry[Any] = Registry("toy", self.package, "register_toy", group)
        importlib.import_module(self.package).registry = registry
        return registry

    def imported(self, stem: str) -> bool:
        return f"{self.package}.{stem}" in sys.modules


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Toys]:
    before = set(sys.modules)
    root = tmp_path / "site"
    root.mkdir()
    monkeypatch.syspath_prepend(root)
    yield Toys(root)
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def distribution(root: Path, name: str, group: str, points: dict[str, str]) -> None:
    """What pip would leave behind for an installed distribution with entry points."""
    info = root / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = "".join(f"{key} = {value}\n" for key, value in points.items())
    (info / "entry_points.txt").write_text(f"[{group}]\n{lines}")
    importlib.invalidate_caches()


# --- names without imports ------------------------------------------------------------------------


def test_every_decorated_name_is_listed_in_order(toys: Toys) -> None:
    toys.plugin("second", "beta")
    toys.plugin("first", "alpha")
    assert toys.registry().names() == ["alpha", "beta"]


def test_names_are_listed_without_importing_any_plugin(toys: Toys) -> None:
    toys.plugin("first", "alpha")
    toys.registry().names()
    assert not toys.imported("first")


def test_a_plugin_that_cannot_be_imported_is_still_listed(toys: Toys) -> None:
    toys.plugin("bad", "broken", top="raise RuntimeError('no such card')")
    assert toys.registry().names() == ["broken"]


def test_a_file_may_hold_several_plugins(toys: Toys) -> None:
    toys.write(
        "pair",
        """
        import {package} as home

        @home.register_toy("one")
        class One: pass

        @home.register_toy("two")
        def two(): pass
    """,
    )
    registry = toys.registry()
    assert registry.names() == ["one", "two"]
    assert [registry.get(name).__name__ for name in registry.names()] == ["One", "two"]


def test_files_with_a_leading_underscore_and_other_decorators_are_not_listed(toys: Toys) -> None:
    toys.plugin("_helper", "hidden")
    toys.write("other", "def register_other(name):\n    return lambda c: c\n\n@register_other('x')\nclass X: pass\n")
    assert toys.registry().names() == []


def test_a_package_that_is_not_installed_is_reported_with_the_remedy() -> None:
    with pytest.raises(UsageError, match="pip install -e"):
        Registry[Any]("toy", "a_package_that_is_not_there", "register_toy").names()


# --- getting one ----------------------------------------------------------------------------------


def test_getting_a_plugin_imports_its_file_and_no_other(toys: Toys) -> None:
    toys.plugin("first", "alpha", "Alpha")
    toys.plugin("second", "beta", "Beta")
    assert toys.registry().get("alpha").__name__ == "Alpha"
    assert (toys.imported("first"), toys.imported("second")) == (True, False)


def test_getting_a_plugin_twice_gives_the_same_class(toys: Toys) -> None:
    toys.plugin("first", "alpha")
    registry = toys.registry()
    assert registry.get("alpha") is registry.get("alpha")


def test_an_unknown_name_suggests_the_nearest_and_lists_the_known(toys: Toys) -> None:
    toys.plugin("a", "dverge")
    toys.plugin("b", "soe")
    with pytest.raises(UsageError, match=r"unknown toy 'diverge'.*did you mean 'dverge'.*dverge, soe"):
        toys.registry().get("diverge")


def test_an_unknown_name_like_no_other_lists_the_known_without_a_suggestion(toys: Toys) -> None:
    toys.plugin("b", "soe")
    with pytest.raises(UsageError) as refusal:
        toys.registry().get("quux")
    assert str(refusal.value) == "unknown toy 'quux'; known: soe"


def test_an_unknown_name_imports_nothing(toys: Toys) -> None:
    toys.plugin("a", "dverge")
    with pytest.raises(UsageError):
        toys.registry().get("diverge")
    assert not toys.imported("a")


def test_a_broken_plugin_is_reported_with_its_module_and_the_cause(toys: Toys) -> None:
    toys.plugin("bad", "broken", top="raise RuntimeError('no such card')")
    with pytest.raises(PluginError, match=rf"toy 'broken'.*{toys.package}\.bad.*RuntimeError: no such card") as refusal:
        toys.registry().get("broken")
    assert isinstance(refusal.value.__cause__, RuntimeError)


def test_a_broken_plugin_does_not_block_its_neighbours(toys: Toys) -> None:
    toys.plugin("bad", "broken", top="import a_module_that_is_not_there")
    toys.plugin("good", "fine", "Fine")
    assert toys.registry().get("fine").__name__ == "Fine"


def test_a_file_with_a_syntax_error_does_not_block_its_neighbours(toys: Toys) -> None:
    toys.write("bad", "class Broken(:\n")
    toys.plugin("good", "fine", "Fine")
    assert toys.registry().get("fine").__name__ == "Fine"


@pytest.mark.parametrize("content", [b"class Broken(:\n", b"name = '\xff\xfe'\n", b"x = 1\0\n"])
def test_a_file_that_does_not_parse_is_listed_by_its_stem_and_reported_when_asked_for(
    toys: Toys, content: bytes
) -> None:
    toys.plugin("good", "fine")
    (toys.folder / "bad.py").write_bytes(content)
    registry = toys.registry()
    assert registry.names() == ["bad", "fine"]
    with pytest.raises(PluginError, match=rf"{toys.package}\.bad"):
        registry.get("bad")


def test_a_file_that_forgets_to_register_is_told_how(toys: Toys) -> None:
    toys.write(
        "lazy",
        """
        def register_toy(name):
            return lambda cls: cls

        @register_toy("lazy")
        class Lazy: pass
    """,
    )
    with pytest.raises(PluginError, match=r"@register_toy\('lazy'\)"):
        toys.registry().get("lazy")


# --- registering ----------------------------------------------------------------------------------


def new_class(name: str = "Toy", module: str = "somewhere") -> type:
    return type(name, (), {"__module__": module})


def test_the_decorator_returns_the_class_itself(toys: Toys) -> None:
    cls = new_class()
    assert toys.registry().register("x")(cls) is cls


def test_a_taken_name_is_refused_naming_both_owners(toys: Toys) -> None:
    registry = toys.registry()
    registry.register("x")(new_class("First", "here"))
    with pytest.raises(PluginError, match=r"'x' is already registered by here\.First; there\.Second"):
        registry.register("x")(new_class("Second", "there"))


def test_a_refused_duplicate_leaves_the_first_owner_in_place(toys: Toys) -> None:
    registry = toys.registry()
    first = registry.register("x")(new_class("First"))
    with pytest.raises(PluginError):
        registry.register("x")(new_class("Second"))
    assert registry.get("x") is first


def test_the_name_of_a_built_in_that_was_not_imported_yet_is_refused_naming_both_owners(toys: Toys) -> None:
    toys.plugin("first", "alpha")
    with pytest.raises(PluginError, match=r"'alpha'.*first\.py.*mine\.Alpha"):
        toys.registry().register("alpha")(new_class("Alpha", "mine"))


def test_two_built_in_files_with_one_name_are_reported_with_both_owners(toys: Toys) -> None:
    toys.plugin("one", "alpha", "First")
    toys.write(
        "two",
        """
        from {package} import register_toy

        @register_toy("alpha")
        class Second: pass

        @register_toy("beta")
        class Beta: pass
    """,
    )
    registry = toys.registry()
    registry.get("alpha")
    with pytest.raises(PluginError, match=r"one\.First.*two\.Second"):
        registry.get("beta")


def test_a_reloaded_class_takes_the_place_of_its_former_self(toys: Toys) -> None:
    toys.plugin("first", "alpha", "Alpha")
    registry = toys.registry()
    before = registry.get("alpha")
    importlib.reload(sys.modules[before.__module__])
    assert registry.get("alpha") is not before


@pytest.mark.parametrize("name", ["Soe", "SOE", "so e", "so-e", "so/e", "soe[x=1]", "a,b", "", "_", "42"])
def test_a_name_that_is_not_plain_lower_case_is_refused(toys: Toys, name: str) -> None:
    with pytest.raises(PluginError, match="use lower-case letters"):
        toys.registry().register(name)(new_class())


@pytest.mark.parametrize("name", ["2fgsm", "soé", "soe²", ".soe"])
def test_a_name_that_cannot_be_written_in_a_call_is_refused(toys: Toys, name: str) -> None:
    with pytest.raises(PluginError, match="use lower-case letters"):
        toys.registry().register(name)(new_class())


@pytest.mark.parametrize("name", ["soe", "adv_en", "transfer30", "mul_pgd", "_mine"])
def test_plain_names_are_accepted(toys: Toys, name: str) -> None:
    registry = toys.registry()
    registry.register(name)(new_class())
    assert registry.names() == [name]


def test_a_class_that_fails_the_check_of_its_kind_is_not_registered(toys: Toys) -> None:
    registry = toys.registry()

    def check(plugin: Any) -> None:
        raise PluginError("it has no loss")

    with pytest.raises(PluginError, match="it has no loss"):
        registry.register("x", check)(new_class())
    assert registry.names() == []


# --- entry points ---------------------------------------------------------------------------------


def test_an_entry_point_of_another_distribution_is_listed_without_importing_it(toys: Toys) -> None:
    (toys.root / "elsewhere.py").write_text("raise RuntimeError('imported')\n")
    distribution(toys.root, "elsewhere", "toys.group", {"gamma": "elsewhere:Gamma"})
    assert toys.registry("toys.group").names() == ["gamma"]


def test_an_entry_point_of_another_distribution_is_imported_when_asked_for(toys: Toys) -> None:
    (toys.root / "elsewhere.py").write_text("class Gamma:\n    pass\n")
    distribution(toys.root, "elsewhere", "toys.group", {"gamma": "elsewhere:Gamma"})
    assert toys.registry("toys.group").get("gamma").__name__ == "Gamma"


def test_an_entry_point_whose_class_registers_itself_is_found_too(toys: Toys) -> None:
    toys_import = f"from {toys.package} import register_toy\n"
    (toys.root / "elsewhere.py").write_text(f"{toys_import}@register_toy('gamma')\nclass Gamma:\n    pass\n")
    distribution(toys.root, "elsewhere", "toys.group", {"gamma": "elsewhere:Gamma"})
    assert toys.registry("toys.group").get("gamma").__name__ == "Gamma"


def test_a_broken_entry_point_is_reported_with_its_module_and_the_cause(toys: Toys) -> None:
    (toys.root / "elsewhere.py").write_text("raise RuntimeError('no such card')\n")
    distribution(toys.root, "elsewhere", "toys.group", {"gamma": "elsewhere:Gamma"})
    with pytest.raises(PluginError, match=r"'gamma'.*elsewhere.*RuntimeError: no such card"):
        toys.registry("toys.group").get("gamma")


def test_entry_points_of_another_group_are_not_looked_at(toys: Toys) -> None:
    distribution(toys.root, "elsewhere", "others.group", {"gamma": "elsewhere:Gamma"})
    assert toys.registry("toys.group").names() == []


# --- listings -------------------------------------------------------------------------------------


def test_a_listing_gives_summary_and_citation_without_importing(toys: Toys) -> None:
    toys.write("first", ALPHA.replace("On alphas.\n\nA. Author", "On alphas. A. Author"))
    (listing,) = toys.registry().listings()
    assert (listing.name, listing.summary) == ("alpha", "The first letter.")
    assert listing.citation.startswith("On alphas. A. Author, some venue, 2020.")
    assert not toys.imported("first")


def test_a_citation_is_the_first_paragraph_of_the_file_on_one_line(toys: Toys) -> None:
    toys.write("first", ALPHA)
    (listing,) = toys.registry().listings()
    assert listing.citation == "On alphas."


def test_a_plugin_without_docstrings_is_listed_with_empty_texts(toys: Toys) -> None:
    toys.plugin("first", "alpha")
    (listing,) = toys.registry().listings()
    assert (listing.summary, listing.citation) == ("", "")


def test_listings_survive_a_file_with_a_syntax_error(toys: Toys) -> None:
    toys.write("bad", "class Broken(:\n")
    toys.write("first", ALPHA)
    listings = {listing.name: listing.summary for listing in toys.registry().listings()}
    assert listings["alpha"] == "The first letter."
    assert "parse" in listings["bad"]


def test_a_listing_names_where_each_plugin_comes_from(toys: Toys) -> None:
    toys.write("first", ALPHA)
    distribution(toys.root, "elsewhere", "toys.group", {"gamma": "elsewhere:Gamma"})
    registry = toys.registry("toys.group")
    registry.register("mine")(new_class("Mine", "here"))
    origins = {listing.name: listing.origin for listing in registry.listings()}
    assert origins == {"alpha": "first.py", "gamma": "elsewhere:Gamma (elsewhere)", "mine": "here.Mine"}


# --- a plug-in of the user's ----------------------------------------------------------------------


@pytest.fixture
def user_file(toys: Toys, tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, cls: str = "Mine", top: str = "", folder: str = "user") -> Path:
        (tmp_path / folder).mkdir(exist_ok=True)
        path = tmp_path / folder / "my_toy.py"
        path.write_text(
            f"from {toys.package} import register_toy\n{top}\n"
            f"@register_toy({name!r})\nclass {cls}:\n    '''{folder}'''\n"
        )
        return path

    return write


def test_a_file_of_the_users_registers_itself(toys: Toys, user_file: Callable[..., Path]) -> None:
    registry = toys.registry()
    load_plugin(str(user_file("mine")))
    assert registry.get("mine").__name__ == "Mine"


def test_loading_the_same_file_twice_keeps_the_class(toys: Toys, user_file: Callable[..., Path]) -> None:
    registry = toys.registry()
    path = str(user_file("mine"))
    load_plugin(path)
    first = registry.get("mine")
    load_plugin(path)
    assert registry.get("mine") is first


def test_an_installed_module_may_be_loaded_by_name(toys: Toys) -> None:
    (toys.root / "my_module.py").write_text(
        f"from {toys.package} import register_toy\n\n@register_toy('mine')\nclass Mine:\n    pass\n"
    )
    registry = toys.registry()
    load_plugin("my_module")
    assert registry.get("mine").__name__ == "Mine"


def test_a_module_may_be_loaded_by_name_from_the_folder_that_holds_it(
    toys: Toys, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = toys.registry()
    (toys.root / "my_package").mkdir()
    (toys.root / "my_package" / "__init__.py").write_text(
        f"from {toys.package} import register_toy\n\n@register_toy('mine')\nclass Mine:\n    pass\n"
    )
    monkeypatch.chdir(toys.root)
    load_plugin("my_package")
    assert registry.get("mine").__name__ == "Mine"


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"nowhere\.py: no such file"):
        load_plugin(str(tmp_path / "nowhere.py"))


def test_a_missing_module_is_refused() -> None:
    with pytest.raises(PluginError, match="ModuleNotFoundError"):
        load_plugin("a_module_that_is_not_there")


@pytest.mark.parametrize("top", ["import a_module_that_is_not_there", "class Broken(:", "1 / 0"])
def test_a_file_that_does_not_import_is_refused_with_the_cause(
    toys: Toys, user_file: Callable[..., Path], top: str
) -> None:
    toys.registry()
    with pytest.raises(PluginError, match=r"my_toy\.py does not import: \w+Error"):
        load_plugin(str(user_file("mine", top=top)))


def test_a_file_that_was_mended_may_be_loaded_again(toys: Toys, user_file: Callable[..., Path]) -> None:
    registry = toys.registry()
    with pytest.raises(PluginError):
        load_plugin(str(user_file("mine", top="1 / 0")))
    load_plugin(str(user_file("mine")))
    assert registry.get("mine").__name__ == "Mine"


def test_a_file_that_takes_the_name_of_a_built_in_is_refused(toys: Toys, user_file: Callable[..., Path]) -> None:
    toys.plugin("first", "alpha")
    toys.registry()
    with pytest.raises(PluginError, match=r"my_toy\.py.*'alpha'.*first\.py"):
        load_plugin(str(user_file("alpha")))


def test_a_file_in_another_folder_does_not_silently_replace_one_of_the_same_name(
    toys: Toys, user_file: Callable[..., Path]
) -> None:
    toys.registry()
    load_plugin(str(user_file("mine", folder="one")))
    with pytest.raises(PluginError, match="already registered"):
        load_plugin(str(user_file("mine", folder="two")))
