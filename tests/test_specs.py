"""Specifications and their content keys: what changes a key, what does not, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import linecache
import math
import sys
import textwrap
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys_defense import registered, toy_data, toy_setting, toy_spec

from ensdef import codehash, specs
from ensdef.attack_spec import AttackSpec
from ensdef.codehash import code_hash
from ensdef.errors import UsageError
from ensdef.keys import canonical, content_key, non_default
from ensdef.recipe import InnerAttack, Recipe
from ensdef.registry import METHODS
from ensdef.specs import Cell, ModelSpec, Setting, TrainSpec, cell_key, override

quick = settings(deadline=None, max_examples=60, derandomize=True)
DATA = toy_data()
_numbers = count()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


# --- canonical text -------------------------------------------------------------------------------


def test_canonical_text_has_sorted_keys_and_no_spaces() -> None:
    assert canonical({"b": [1, 2.5, None], "a": {"ü": True}}) == '{"a":{"\\u00fc":true},"b":[1,2.5,null]}'


@quick
@given(JSON)
def test_canonical_text_keeps_the_value(value: Any) -> None:
    assert json.loads(canonical(value)) == value


@quick
@given(st.dictionaries(st.text(), st.integers(), max_size=5), st.randoms(use_true_random=False))
def test_canonical_text_does_not_depend_on_the_order_of_keys(value: dict[str, int], random: Any) -> None:
    names = list(value)
    random.shuffle(names)
    assert canonical({name: value[name] for name in names}) == canonical(value)


def test_lists_and_tuples_are_the_same_text() -> None:
    assert canonical((1, (2, 3))) == canonical([1, [2, 3]])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_hold_has_no_canonical_text(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical({"value": value})


def test_a_content_key_is_the_sha256_of_the_canonical_text() -> None:
    assert content_key({"b": 1, "a": 2}) == hashlib.sha256(b'{"a":2,"b":1}').hexdigest()


def test_only_parameters_off_their_defaults_are_told() -> None:
    assert non_default(InnerAttack, dataclasses.asdict(InnerAttack(steps=7, start="zero"))) == {
        "steps": 7,
        "start": "zero",
    }
    assert non_default(InnerAttack, dataclasses.asdict(InnerAttack())) == {}


# --- training keys --------------------------------------------------------------------------------


def base(**changes: Any) -> TrainSpec:
    return toy_spec("adv_en", DATA, **changes)


def test_a_key_is_64_hex_digits_and_stable() -> None:
    assert base().key == base().key
    assert len(base().key) == 64
    int(base().key, 16)


def data_with(setting: Setting, **changes: Any) -> Setting:
    return dataclasses.replace(setting, data=dataclasses.replace(setting.data, **changes))


def hyper(**values: Any) -> Callable[[], TrainSpec]:
    return lambda: toy_spec("adv_en", DATA, values)


KEY_FIELDS: dict[str, Callable[[], TrainSpec]] = {
    "method": lambda: toy_spec("soe", DATA),
    "hyper-parameter": hyper(clean_term=True),
    "architecture": lambda: base(architecture="resnet8"),
    "architecture parameter": lambda: base(architecture="small_resnet[width=6]"),
    "members": lambda: base(members=3),
    "norm": lambda: base(norm="l2"),
    "training radius": lambda: base(train_eps="0.2"),
    "drawn training radius": lambda: base(train_eps="uniform(0.05,0.1)"),
    "precision": lambda: base(precision="bf16"),
    "seed": lambda: base(seed=1),
    "data": lambda: TrainSpec.create("adv_en", {}, data_with(toy_setting(DATA), name="mnist")),
    "training images": lambda: base_on(toy_data(seed=1)),
    "number of training images": lambda: base_on(toy_data(25)),
    "mean": lambda: TrainSpec.create("adv_en", {}, data_with(toy_setting(DATA), mean=(0.4,))),
    "std": lambda: TrainSpec.create("adv_en", {}, data_with(toy_setting(DATA), std=(0.3,))),
    "number of classes": lambda: TrainSpec.create("adv_en", {}, data_with(toy_setting(DATA), num_classes=7)),
    **{
        f"recipe: {name}": lambda name=name, value=value: base(**{name: value})  # type: ignore[misc]
        for name, value in {
            "optimizer": "adam",
            "lr": 0.01,
            "momentum": 0.5,
            "weight_decay": 0.01,
            "epochs": 2,
            "batch_size": 16,
            "schedule": "cosine",
            "milestones": (0.5,),
            "gamma": 0.2,
            "augment": "flip",
            "keep": "best",
        }.items()
    },
    **{
        f"inner attack: {name}": lambda name=name, value=value: base(attack={"steps": 1, name: value})  # type: ignore[misc]
        for name, value in {
            "steps": 2,
            "step_size": "eps/5",
            "start": "zero",
            "batch_norm": "train",
            "label": "predicted",
        }.items()
    },
}


def base_on(data: Any) -> TrainSpec:
    return toy_spec("adv_en", data)


@pytest.mark.parametrize("field", KEY_FIELDS)
def test_every_choice_that_may_change_the_weights_changes_the_key(field: str) -> None:
    assert KEY_FIELDS[field]().key != base().key


def test_no_two_of_these_choices_share_a_key() -> None:
    assert len({spec().key for spec in KEY_FIELDS.values()} | {base().key}) == len(KEY_FIELDS) + 1


def test_the_list_of_choices_covers_recipe_and_inner_attack() -> None:
    named = {field.partition(": ")[2] for field in KEY_FIELDS}
    fields = {field.name for cls in (Recipe, InnerAttack) for field in dataclasses.fields(cls)}
    assert fields - {"attack"} <= named


@pytest.mark.parametrize("change", [{"folder": "/elsewhere"}, {"test_checksum": "0" * 16}, {"limit": 24}])
def test_where_the_data_lie_and_what_they_are_tested_on_do_not_change_the_key(change: dict[str, Any]) -> None:
    assert TrainSpec.create("adv_en", {}, data_with(toy_setting(DATA), **change)).key == base().key


def test_device_and_attack_batch_size_are_no_part_of_a_training() -> None:
    fields = {field.name for cls in (TrainSpec, Setting, ModelSpec) for field in dataclasses.fields(cls)}
    assert not fields & {"device", "workers", "folder", "results"}


@pytest.mark.parametrize(
    ("one", "other"),
    [("8/255", "16/510"), ("0.1", "1/10"), ("0.5", ".5"), ("uniform(0.01,0.05)", "uniform( 1/100 , 1/20 )")],
)
def test_the_spelling_of_a_radius_does_not_change_the_key(one: str, other: str) -> None:
    assert base(train_eps=one).key == base(train_eps=other).key
    assert base(train_eps=one).setting.train_eps == one, "kept as written"


def test_the_spelling_of_parameters_does_not_change_the_key() -> None:
    assert (
        base(architecture="small_resnet[width=4]").key == base(architecture="small_resnet[width=4,activation=relu]").key
    )
    assert toy_spec("adp", DATA, {"entropy_weight": "2"}).key == toy_spec("adp", DATA).key
    assert toy_spec("adp", DATA, {"entropy_weight": 2}).key == toy_spec("adp", DATA, {"entropy_weight": 2.0}).key
    assert base(lr="1/20", epochs="1").key == base().key


def test_the_number_of_members_asked_for_does_not_matter_where_the_defence_fixes_it() -> None:
    assert toy_spec("adv", DATA, members=2).key == toy_spec("adv", DATA, members=5).key
    assert toy_spec("adv", DATA, members=5).model.members == 1


def test_the_engine_s_numerics_enter_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = base().key
    monkeypatch.setattr(specs, "NUMERICS", codehash.NUMERICS + 1)
    assert base().key != before


def test_the_method_s_code_enters_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = base().key
    monkeypatch.setattr(specs, "code_hash", lambda plugin: "another")
    assert base().key != before


def test_a_description_holds_the_key_and_every_choice_as_json() -> None:
    with registered():
        spec = toy_spec("toy_finetuned", DATA)
        described = json.loads(json.dumps(spec.describe()))
        assert described["key"] == spec.key
        assert described["prerequisites"] == {"base": spec.prerequisites["base"].key}
    assert described["recipe"]["attack"]["steps"] == 1
    assert described["setting"]["train_eps"] == "0.1"
    assert described["model"]["members"] == 2


def test_the_keys_of_prerequisites_enter_the_key() -> None:
    spec = base()
    keys = {
        dataclasses.replace(spec, prerequisites=needed).key
        for needed in (
            {},
            {"base": base(seed=1)},
            {"base": base(seed=2)},
            {"other": base(seed=1)},
            {"base": base(seed=1), "other": base(seed=2)},
        )
    }
    assert len(keys) == 5


def test_calls_are_written_with_what_differs_from_the_defaults() -> None:
    model = toy_spec("adp", DATA, {"entropy_weight": 1, "adversarial": "ce"}).model
    assert model.method_call == "adp[entropy_weight=1.0,adversarial=ce]"
    assert model.architecture_call == "small_resnet[width=4]"
    assert toy_spec("adp", DATA, architecture="resnet20").model.architecture_call == "resnet20"


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "adpp"}, r"unknown method 'adpp'.*'adp'"),
        ({"hyper": {"alpha": 1}}, r"adp has no parameter 'alpha'.*entropy_weight"),
        ({"hyper": {"adversarial": "half"}}, r"adp\[adversarial\] is 'half'; expected one of full, ce, none"),
        ({"architecture": "resnet21"}, r"unknown architecture 'resnet21'; did you mean 'resnet2"),
        ({"architecture": "small_resnet[depth=3]"}, r"small_resnet has no parameter 'depth'.*width"),
        ({"members": 0}, r"members is 0; expected at least 1"),
        ({"train_eps": "8"}, r"8/255"),
        ({"norm": "l1"}, r"l1"),
        ({"warmup": 5}, r"training has no setting warmup; it has: optimizer.*attack"),
        ({"attack": {"restarts": 2}}, r"inner attack has no parameter 'restarts'.*steps"),
        ({"epochs": 0}, r"epochs is 0; expected at least 1"),
        ({"schedule": "linear"}, r"training: schedule is 'linear'"),
    ],
)
def test_an_impossible_training_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    changes = dict(changes)
    method, values = changes.pop("method", "adp"), changes.pop("hyper", {})
    with pytest.raises(UsageError, match=message):
        toy_spec(method, DATA, values, **changes)


def test_a_recipe_is_overridden_field_by_field_and_the_inner_attack_too() -> None:
    recipe = METHODS.get("adp").recipe
    changed = override(recipe, {"epochs": "3", "attack": {"steps": "2"}})
    assert changed == dataclasses.replace(recipe, epochs=3, attack=dataclasses.replace(recipe.attack, steps=2))
    assert override(recipe, {}) == recipe


def test_the_method_s_own_recipe_is_the_default() -> None:
    spec = TrainSpec.create("adp", {}, dataclasses.replace(toy_setting(DATA), recipe={"augment": "flip"}))
    assert spec.recipe == dataclasses.replace(METHODS.get("adp").recipe, augment="flip")


def test_an_augmentation_left_to_the_data_set_enters_the_key_as_what_it_is() -> None:
    assert base(augment=None).recipe.augment == "none", "that of digits"
    assert base(augment=None).key == base(augment="none").key
    on_cifar = TrainSpec.create("adv_en", {}, data_with(toy_setting(DATA, augment=None), name="cifar10"))
    assert on_cifar.recipe.augment == "crop+flip"


def test_an_unknown_augmentation_is_refused_before_training() -> None:
    with pytest.raises(UsageError, match=r"unknown augmentation 'blur'"):
        base(augment="crop+blur")


def test_a_derived_training_shares_the_setting_but_for_its_changes() -> None:
    spec = base(epochs=3, seed=2)
    derived = spec.derive("nat", {"reduction": "mean"}, seed=9)
    assert (derived.method, derived.hyper.reduction, derived.setting.seed) == ("nat", "mean", 9)
    assert derived.setting.recipe == spec.setting.recipe
    assert derived.recipe.epochs == 3


# --- attacks --------------------------------------------------------------------------------------


def attack(name: str = "pgd", params: Any = None, norm: str = "linf", eps: Any = "8/255", **options: Any) -> AttackSpec:
    return AttackSpec.create(name, params or {}, norm, eps, **options)


def test_parameters_left_out_are_filled_in_so_that_they_spell_the_same_attack() -> None:
    assert attack().params["steps"] == 50
    assert attack() == attack(params={"steps": "50"})
    assert attack().identity() == attack(params={"steps": 50}).identity()
    assert attack().identity() != attack(params={"steps": 49}).identity()


@pytest.mark.parametrize("eps", ["16/510", "0.0313725490196078431372549019607843"])
def test_a_radius_is_kept_as_written_and_enters_the_key_reduced(eps: str) -> None:
    assert attack(eps=eps).written == eps
    assert attack(eps="16/510").identity() == attack(eps="8/255").identity()
    assert attack(eps="16/510").eps == "8/255"
    assert attack(eps=eps).eps_value == pytest.approx(8 / 255)
    assert "written" not in attack(eps=eps).identity()


ATTACK_FIELDS: dict[str, Callable[[], AttackSpec]] = {
    "name": lambda: attack("bim"),
    "parameter": lambda: attack(params={"restarts": 2}),
    "norm": lambda: attack(norm="l2"),
    "radius": lambda: attack(eps="4/255"),
    "success": lambda: attack(params={"success": "last"}),
    "search": lambda: attack(search="bf16+fp32"),
    "combiner": lambda: attack(combiner="vote"),
    "seed": lambda: attack(seed=1),
}


@pytest.mark.parametrize("field", ATTACK_FIELDS)
def test_every_choice_that_may_change_a_verdict_changes_the_cell_s_key(field: str) -> None:
    assert cell_key("model", ATTACK_FIELDS[field](), "subset") != cell_key("model", attack(), "subset")


def test_model_and_test_images_change_the_cell_s_key() -> None:
    keys = {cell_key(model, attack(), subset) for model in ("a", "b") for subset in ("c", "d")}
    assert len(keys) == 4


def test_a_cell_s_key_is_made_of_its_training_s_key() -> None:
    cell = Cell(base(), attack(), 10, "subset")
    assert cell.key == cell_key(base().key, attack(), "subset")
    assert cell.key == Cell(base(), attack(), 10, "subset").key


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "pdg"}, r"unknown attack 'pdg'.*'pgd'"),
        ({"params": {"step": 3}}, r"pgd has no parameter 'step'.*steps"),
        ({"params": {"steps": "many"}}, r"pgd\[steps\] is 'many'"),
        ({"params": {"steps": -1}}, r"pgd: steps is -1"),
        ({"params": {"success": "first"}}, r"pgd\[success\] is 'first'; expected one of any, last"),
        ({"eps": "8"}, r"pgd: .*8/255"),
        ({"eps": "-0.1"}, r"pgd: .*-0\.1"),
        ({"eps": "nan"}, r"pgd: .*nan"),
        ({"norm": "l1", "eps": "0.1"}, r"pgd.*l1"),
        ({"norm": "l2", "eps": "9", "dimensions": 64}, r"pgd: .*l2"),
        ({"combiner": "median"}, r"unknown combiner 'median'; expected native, avg, max, vote"),
        ({"search": "fp16"}, r"search is 'fp16'; expected one of fp32, bf16, bf16\+fp32"),
    ],
)
def test_an_impossible_attack_is_refused_and_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        attack(**options)


def test_an_attack_is_written_with_what_differs_from_the_defaults() -> None:
    assert attack().call == "pgd"
    assert attack(params={"success": "last", "restarts": 5, "steps": 50}).call == "pgd[restarts=5,success=last]"


def test_the_parameters_are_handed_to_the_attack_as_its_own_dataclass() -> None:
    assert attack(params={"restarts": "3"}).params_object.restarts == 3


# --- code fingerprints ----------------------------------------------------------------------------


class Plugins:
    """A throw-away package of plug-in modules, whose sources can be rewritten."""

    def __init__(self, root: Path) -> None:
        self.name = f"plugins_of_test_{next(_numbers)}"
        self.folder = root / self.name
        self.folder.mkdir()
        self.write("__init__", "")

    def write(self, stem: str, source: str) -> None:
        text = textwrap.dedent(source).lstrip().replace("{package}", self.name)
        (self.folder / f"{stem}.py").write_text(text, encoding="utf-8")

    def hash(self, stem: str = "plugin") -> str:
        """Of the class ``Plugin`` in a module, imported afresh."""
        for name in [name for name in sys.modules if name.split(".")[0] == self.name]:
            del sys.modules[name]
        importlib.invalidate_caches()
        linecache.clearcache()
        sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
        try:
            return code_hash(importlib.import_module(f"{self.name}.{stem}").Plugin)
        finally:
            sys.dont_write_bytecode = before


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plugins]:
    monkeypatch.syspath_prepend(str(tmp_path))
    package = Plugins(tmp_path)
    yield package
    for name in [name for name in sys.modules if name.split(".")[0] == package.name]:
        del sys.modules[name]


PLUGIN = '''
"""On plug-ins."""


class Plugin:
    """A plug-in."""

    def loss(self, x):
        """Twice."""
        return 2 * x
'''


def test_comments_docstrings_and_layout_leave_the_fingerprint_alone(plugins: Plugins) -> None:
    plugins.write("plugin", PLUGIN)
    before = plugins.hash()
    plugins.write(
        "plugin",
        '''
        # a comment
        class Plugin:

            def loss(
                self,
                x,
            ):  # another
                """Twice the argument,
                in more words."""
                return (2 * x)
        ''',
    )
    assert plugins.hash() == before
    assert len(before) == 16


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("2 * x", "3 * x"),
        ("2 * x", "x * 2"),
        ("def loss(self, x)", "def loss(self, x, y=0)"),
        ("return 2", "return -2"),
    ],
)
def test_code_changes_the_fingerprint(plugins: Plugins, old: str, new: str) -> None:
    plugins.write("plugin", PLUGIN)
    before = plugins.hash()
    plugins.write("plugin", PLUGIN.replace(old, new))
    assert plugins.hash() != before


def test_a_string_that_is_no_docstring_is_code(plugins: Plugins) -> None:
    hashes = set()
    for text in ("one", "two"):
        plugins.write("plugin", f"class Plugin:\n    name = '{text}'\n")
        hashes.add(plugins.hash())
    assert len(hashes) == 2


@pytest.mark.parametrize(
    "statement",
    [
        "from {package}._shared import factor",
        "from ._shared import factor",
        "from . import _shared",
        "from {package} import _shared",
        "import {package}._shared as shared",
    ],
)
def test_the_fingerprint_follows_modules_of_the_same_package(plugins: Plugins, statement: str) -> None:
    plugins.write("plugin", statement + "\n\n\nclass Plugin:\n    pass\n")
    hashes = []
    for shared in ("factor = 2", "factor = 3", "factor = 3  # three"):
        plugins.write("_shared", shared)
        hashes.append(plugins.hash())
    assert hashes[0] != hashes[1] == hashes[2]


def test_the_fingerprint_follows_imports_of_imports_and_ends_in_a_circle(plugins: Plugins) -> None:
    plugins.write("plugin", "from ._shared import factor\n\n\nclass Plugin:\n    pass\n")
    plugins.write("_shared", "from . import _deeper\n\nfactor = 1\n")
    hashes = []
    for value in (1, 2):
        plugins.write("_deeper", f"import {{package}}._shared\n\nvalue = {value}\n")
        hashes.append(plugins.hash())
    assert hashes[0] != hashes[1]


def test_a_neighbour_that_is_not_imported_leaves_the_fingerprint_alone(plugins: Plugins) -> None:
    plugins.write("plugin", "import math\n\n\nclass Plugin:\n    pass\n")
    plugins.write("_neighbour", "value = 1")
    before = plugins.hash()
    plugins.write("_neighbour", "value = 2")
    assert plugins.hash() == before


def test_the_fingerprint_follows_the_class_that_a_plug_in_derives_from_in_another_package(
    plugins: Plugins, tmp_path: Path
) -> None:
    other = Plugins(tmp_path)
    plugins.write("plugin", f"from {other.name}.method import Method\n\n\nclass Plugin(Method):\n    pass\n")
    hashes = []
    for formula in ("return 2 * x", "return 3 * x", "return 3 * x  # three"):
        other.write("method", f"class Method:\n    def loss(self, x):\n        {formula}\n")
        for name in [name for name in sys.modules if name.split(".")[0] == other.name]:
            del sys.modules[name]
        hashes.append(plugins.hash())
    assert hashes[0] != hashes[1] == hashes[2]


def test_built_in_methods_have_fingerprints_of_their_own() -> None:
    assert code_hash(METHODS.get("nat")) == code_hash(METHODS.get("adv_en")), "one file"
    assert len({code_hash(METHODS.get(name)) for name in ("nat", "adp", "soe")}) == 3
