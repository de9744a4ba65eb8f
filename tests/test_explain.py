"""``ensdef explain``, on the real command line, and the catalogue behind it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from ensdef.health.catalogue import FLAGS, finding, graded

ENSDEF = Path(__file__).parent.parent / "ensdef"


def ensdef(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ensdef", *words], capture_output=True, text=True, timeout=60)


def test_a_flag_is_explained_with_its_meaning_its_rule_and_what_to_do() -> None:
    done = ensdef("explain", "zero_gradient")
    assert (done.returncode, done.stderr) == (0, "")
    flag = FLAGS["zero_gradient"]
    for part in (flag.name, "masking", flag.rule, flag.meaning, flag.action, flag.source):
        assert part in done.stdout


def test_without_a_flag_all_are_listed() -> None:
    done = ensdef("explain")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == sorted(FLAGS)


def test_an_unknown_flag_is_refused_and_the_nearest_is_suggested() -> None:
    done = ensdef("explain", "zero_gradients")
    assert done.returncode == 2
    assert "unknown flag 'zero_gradients'; did you mean 'zero_gradient'" in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


def test_the_catalogue_is_read_without_torch() -> None:
    code = "import sys, ensdef.health.catalogue, ensdef.health.statistics; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"


def raised_in(path: Path) -> set[str]:
    """Names given to functions that make findings, and entries of counts by flag."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", getattr(node.func, "attr", "")) in ("finding", "_finding", "beats", "adds")
        and node.args
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    }


@pytest.mark.parametrize("name", ["training_health.py", "health/basic.py", "health/full.py", "health/report.py"])
def test_every_flag_that_is_raised_is_in_the_catalogue(name: str) -> None:
    raised = raised_in(ENSDEF / name)
    assert raised
    assert raised <= set(FLAGS)


@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_of_the_catalogue_is_named_where_it_is_raised(name: str) -> None:
    files = [*ENSDEF.glob("health/*.py"), ENSDEF / "training_health.py", ENSDEF / "evaluation.py"]
    sources = [path.read_text(encoding="utf-8") for path in files if path.name != "catalogue.py"]
    assert any(f'"{name}"' in source for source in sources)


@pytest.mark.parametrize("name", FLAGS)
def test_a_finding_has_the_form_of_a_flag(name: str) -> None:
    made = finding(name, 0.5, "seen here")
    assert set(made) == {"flag", "severity", "value", "threshold", "meaning", "action"}
    assert made["flag"] == name
    assert made["severity"] in ("info", "masking")
    assert made["meaning"].endswith(": seen here")
    assert made["action"] == FLAGS[name].action


def test_a_difference_between_attacks_is_masking_beyond_ten_points_only() -> None:
    assert graded(0.1) == "info"
    assert graded(0.101) == "masking"
