"""Files that others may have made: what is refused before it can do harm, and that nothing of ours is."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from toys_records import measured

from ensdef import bounded
from ensdef.bounded import check_fields, inside, parse_json, parse_toml, read_text, safe_name
from ensdef.checkpoints import SPEC, WEIGHTS, load_checkpoint
from ensdef.datasets import imagefolder
from ensdef.errors import CheckpointError, DataError, UsageError
from ensdef.manifests import Manifests
from ensdef.notation import fraction
from ensdef.records import Record, Store, read_record

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 100_000, "nested deeper"),
        ('{"a":' * 70 + "1" + "}" * 70, "nested deeper"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "Infinity"),
        ('{"a": 1e999}', "1e999"),
        ('{"a": ' + "9" * 5000 + "}", "digits"),
        ('{"a": 92233720368547758080}', "64 bits"),
        ('{"a": 1, "a": 2}', "'a' twice"),
        ('{"a": "\\ud800"}', "surrogate"),
        ("{", "no JSON"),
    ],
)
def test_json_that_only_some_read_or_that_harms_who_reads_it_is_refused(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        parse_json(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a = " + "[" * 3000, "nested deeper"),
        (".".join("a" * 100) + " = 1", "nested deeper"),
        ("a = nan", "NaN"),
        ("a = -inf", "infinite"),
        ("a = 1e999", "infinite"),
        ("a = " + "9" * 5000, "digits"),
        ("a = 99999999999999999999", "64 bits"),
        ("a = 2026-01-01", "date"),
        ('a = "\\u0000"', "null character"),
        ("a = 1\na = 2", "Cannot overwrite"),
        ("# " + "x" * (1 << 20), "1 MB"),
    ],
)
def test_toml_that_no_protocol_needs_is_refused(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        parse_toml(text)


def test_what_is_plain_is_read_as_the_standard_library_reads_it() -> None:
    body = {"text": 'a [ { " \\ \u20ac', "number": [1, -2.5, 1e300, 2**63], "empty": [{}, [], None, True]}
    assert parse_json(json.dumps(body)) == body


def test_all_that_is_published_is_read(tmp_path: Path) -> None:
    published = ROOT / "results" / "published"
    assert sum(1 for _ in Store(published).all()) > 100


def test_a_file_beyond_its_limit_and_one_that_is_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"x" * 11)
    assert read_text(tmp_path / "large", 11) == "x" * 11
    with pytest.raises(UsageError, match="larger than"):
        read_text(tmp_path / "large", 10)
    (tmp_path / "latin").write_bytes(b"\xff")
    os.mkfifo(tmp_path / "pipe")
    for name, told in (("latin", "UTF-8"), ("pipe", "no regular file"), (".", "cannot be read"), ("none", "cannot be")):
        with pytest.raises(UsageError, match=told):
            read_text(tmp_path / name, 10)


@pytest.mark.parametrize(
    "name", ["../a", "a/b", "/etc/passwd", "..", ".", "", ".hidden", "a\\b", "a\0b", "a\n", "x" * 300]
)
def test_no_name_leads_anywhere_else(name: str) -> None:
    with pytest.raises(UsageError, match="method is"):
        safe_name(name, "method")
    with pytest.raises(UsageError, match="dataset is"):
        Record.from_json(measured("soe", "pgd", [1, 0], dataset=name).to_json())


def test_no_path_in_a_manifest_leads_out_of_the_results_folder(tmp_path: Path) -> None:
    results, outside = tmp_path / "results", tmp_path / "outside.json"
    outside.write_text(measured("soe", "pgd", [1, 0]).to_json())
    manifests = Manifests(results)
    manifests.folder.mkdir(parents=True)
    (results / "link.json").symlink_to(outside)
    for path in ("../outside.json", str(outside), "link.json", "manifests/../../outside.json"):
        (manifests.folder / "t.json").write_text(json.dumps({"title": "", "records": [path]}))
        with pytest.raises(UsageError, match="leads out of"):
            manifests.read("t")
    assert inside(results, "records/a.json") == results / "records/a.json"


@dataclass(frozen=True)
class Shape:
    whole: int
    number: float | None
    kind: Literal["a", "b"]
    size: tuple[int, int]
    flags: tuple[float, ...]
    names: list[str]
    counts: Mapping[str, list[int]]
    anything: Any


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("whole", (0, -3), (True, 1.0, "1", None, 2**70)),
        ("number", (1, 0.5, None), ("0.5", False, [])),
        ("kind", ("a",), ("c", None)),
        ("size", ([1, 2],), ([1], [1, 2, 3], [1, 2.5], "12")),
        ("flags", ([], [1.0, 2.0]), (1.0, ["a"])),
        ("names", ([], ["a"]), ([1], "a", {})),
        ("counts", ({}, {"a": [1, 2]}), ({"a": [1, True]}, {"a": 1}, [])),
        ("anything", (1, None, {"a": []}), ()),
    ],
)
def test_fields_are_of_their_annotated_types(name: str, good: tuple[Any, ...], bad: tuple[Any, ...]) -> None:
    for value in good:
        check_fields(Shape, {name: value})
    for value in bad:
        with pytest.raises(UsageError, match=f"{name} is"):
            check_fields(Shape, {name: value})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"flags": [{"flag": "x"}]}, "flag has no severity"),
        ({"flags": [5]}, "flags is"),
        ({"n": "2"}, "n is '2'"),
        ({"robust_accuracy": 1.5}, "in \\[0, 1\\]"),
        ({"provenance": {"also_in": "a"}}, "provenance: also_in"),
        ({"provenance": {"training": {"seconds": "long"}}}, "provenance: training: seconds"),
        ({"training": {"deviations": [1]}}, "training: deviations"),
        ({"outcomes": {"ids": [0, 1], "clean": [1, "1"], "robust": [0, 0]}}, "outcomes is"),
        ({"label": None}, "label is None"),
    ],
)
def test_a_record_whose_fields_are_of_other_types_is_refused(
    changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    body = json.loads(measured("soe", "pgd", [1, 0]).to_json())
    (tmp_path / "r.json").write_text(json.dumps({**body, **changes}))
    with pytest.raises(UsageError, match=told):
        read_record(tmp_path / "r.json")


def test_a_number_whose_exponent_would_fill_the_memory_is_refused_at_once() -> None:
    for text in ("1e999999999", "1e-999999999", "9" * 5000, "1/" + "9" * 5000):
        with pytest.raises(UsageError, match="no floating-point number"):
            fraction(text, "eps")


# checkpoints

MODEL = {
    "method": "nat",
    "hyper": {},
    "architecture": "small_resnet",
    "architecture_params": {"width": 4},
    "members": 1,
    "num_classes": 3,
    "image_shape": [1, 8, 8],
    "mean": [0.5],
    "std": [0.25],
}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"members": 10**9}, "members is 1000000000"),
        ({"num_classes": 10**12}, "num_classes"),
        ({"num_classes": 1000}, "belongs to another architecture"),
        ({"architecture_params": {"width": 10**6}}, "architecture_params.width"),
        ({"architecture_params": {"width": 1000}}, "belongs to another architecture"),
        ({"architecture_params": {"width": "4"}}, "width is '4'"),
        ({"architecture": "resnet", "architecture_params": {"depth": 6 * 10**8 + 2}}, "depth"),
        ({"image_shape": [10**6, 8, 8], "mean": [0.5], "std": [0.25]}, "image_shape"),
        ({"mean": "0.5"}, "mean"),
        ({"method": "../nat"}, "unknown method"),
    ],
)
def test_a_description_that_asks_for_more_than_the_weights_have_is_refused_before_it_is_built(
    changes: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ensdef import checkpoints

    monkeypatch.setattr(checkpoints, "build_defense", lambda spec: pytest.fail("it was built"))
    save_file({"members.0.weight": torch.zeros(3, 4)}, tmp_path / WEIGHTS)
    (tmp_path / SPEC).write_text(json.dumps({"model": {**MODEL, **changes}}))
    with pytest.raises(CheckpointError, match=told):
        load_checkpoint(tmp_path)


# images


def test_an_image_of_too_many_pixels_or_bytes_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (40, 50)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(imagefolder, "MOST_PIXELS", 1999)
    with pytest.raises(DataError, match="40x50 pixels, more than 1,999"):
        imagefolder._rgb(tmp_path / "bomb.png")
    monkeypatch.setattr(imagefolder, "LARGEST_FILE", 50)
    with pytest.raises(DataError, match="MB"):
        imagefolder._rgb(tmp_path / "bomb.png")


# the sources

FORBIDDEN = {"eval", "exec", "compile", "__import__"}
PICKLING = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
#: Who may, and why.
ALLOWED = {
    "ensdef/foreign.py": {"torch.load"},  # other people's files, weights_only
    # between processes that this one started, in a folder that only it can read
    "ensdef/launch.py": {"pickle", "torch.load", "torch.load without weights_only"},
    # between a command and its own workers
    "ensdef/executor.py": {"pickle"},
    "ensdef/ray_executor.py": {"pickle"},
    "ensdef/worker.py": {"pickle"},
}


def dangerous(path: Path) -> set[str]:
    """Calls and imports that can run what a file says."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            found |= {module for module in modules if module.partition(".")[0] in PICKLING}
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name in FORBIDDEN or name in ("torch.load", "yaml.load", "yaml.unsafe_load", "pd.read_pickle"):
                found.add(name)
            if name in ("np.load", "numpy.load") and keywords.get("allow_pickle", "False") != "False":
                found.add(name)
            if keywords.get("shell") == "True" or name in ("os.system", "os.popen"):
                found.add(name)
            if name == "torch.load" and keywords.get("weights_only") != "True":
                found.add("torch.load without weights_only")
    return found


def test_nothing_in_the_project_unpickles_or_runs_what_a_file_says() -> None:
    sources = [*ROOT.glob("ensdef/**/*.py"), *ROOT.glob("methods/*.py"), *ROOT.glob("attacks/*.py")]
    assert len(sources) > 150
    found = {path.relative_to(ROOT).as_posix(): dangerous(path) for path in sources}
    assert {name: calls for name, calls in found.items() if calls} == ALLOWED


def test_limits_are_far_above_what_runs_write() -> None:
    largest = max(path.stat().st_size for path in (ROOT / "results" / "published" / "records").glob("*/*/*.json"))
    assert 100 * largest < bounded.RECORD
