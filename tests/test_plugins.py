"""Plug-ins from elsewhere, their starting points, and the contract that catches broken ones."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import ensdef
import ensdef.cli.inspect
import ensdef.cli.plugins
import ensdef.cli.run
from ensdef.cli import cli
from ensdef.registry import ATTACKS, METHODS, load_plugin
from ensdef.testing import Finding, check_plugin

SMALL = ("--samples", "20", "--limit", "100", "--epochs", "1", "--members", "2", "--device", "cpu")

DEFENSE = '''
"""On breaking things (A. Author; nowhere, 2020)."""

from dataclasses import dataclass

import torch

import ensdef
from ensdef import combine
from ensdef.losses import member_cross_entropy


class Sound(ensdef.EnsembleDefense):
    """Breaks nothing."""

    def loss(self, batch, progress):
        return {"ce": member_cross_entropy(self.member_logits(batch.x), batch.y).mean()}


@ensdef.register_defense("{name}")
class Plugin(Sound):
    """Breaks what its body breaks."""

'''

ATTACK = '''
"""On breaking things (A. Author; nowhere, 2020)."""

from dataclasses import dataclass

import torch

import ensdef
from ensdef.losses import margin


class Sound(ensdef.IterativeAttack):
    """Breaks nothing."""

    steps = 5

    def gradient(self, target, x_adv, y):
        x_adv = x_adv.detach().requires_grad_()
        return torch.autograd.grad(margin(target(x_adv), y).sum(), x_adv)[0]

    def step(self, target, x_adv, y, state, threat, rng):
        return x_adv + threat.eps / 4 * threat.ascent(self.gradient(target, x_adv, y)), state


@ensdef.register_attack("{name}")
class Plugin(Sound):
    """Breaks what its body breaks."""

'''


@pytest.fixture(autouse=True)
def _registries_as_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it; the built-in ones stay."""
    for registry in (METHODS, ATTACKS):
        for name in registry.names():
            registry.get(name)
        monkeypatch.setattr(registry, "_registered", dict(registry._registered))


def ens(*words: str | os.PathLike[str]) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(cli, [os.fspath(word) for word in words], prog_name="ensdef")


def write(folder: Path, template: str, name: str, body: str) -> Path:
    path = folder / f"{name}.py"
    body = textwrap.indent(textwrap.dedent(body).strip(), "    ")
    path.write_text(template.replace("{name}", name).lstrip() + body + "\n", encoding="utf-8")
    return path


def environment(*folders: Path) -> dict[str, str]:
    """Of a new interpreter that finds this ensdef, and the packages in ``folders``."""
    root = Path(ensdef.__file__).parents[1]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (root, *folders)))}


# --- files and distributions outside the repository -----------------------------------------------


def test_a_one_file_defence_from_anywhere_gets_its_row(tmp_path: Path) -> None:
    plugin = write(tmp_path, DEFENSE, "far_away", "pass")
    words = ("--method", "far_away,nat", "--attack", "fgsm", *SMALL, "--results", tmp_path / "results", "--json")
    result = ens("bench", "--plugin", plugin, *words)
    assert result.exit_code == 0, result.output
    records = json.loads(result.stdout)
    assert [record["method"] for record in records] == ["far_away", "nat"]
    assert all(0 <= record["robust_accuracy"] <= record["clean_accuracy"] <= 1 for record in records)
    assert "| far_away | " in (tmp_path / "results/tables/bench.md").read_text(encoding="utf-8")


def test_a_one_file_attack_from_anywhere_gets_its_column(tmp_path: Path) -> None:
    plugin = write(tmp_path, ATTACK, "far_shot", "pass")
    words = ("--method", "nat", "--attack", "far_shot,fgsm", *SMALL, "--results", tmp_path / "results", "--json")
    result = ens("bench", "--plugin", plugin, *words)
    assert result.exit_code == 0, result.output
    assert [record["attack"] for record in json.loads(result.stdout)] == ["far_shot", "fgsm"]


def test_the_hyper_parameters_of_a_plugin_are_set_in_brackets_and_kept_in_the_record(tmp_path: Path) -> None:
    body = """
    @dataclass(frozen=True)
    class Hyper:
        weight: float = 1.0
        flavour: str = "plain"
    """
    plugin = write(tmp_path, DEFENSE, "tunable", body)
    words = ("--attack", "fgsm", *SMALL, "--results", tmp_path / "results", "--json")
    result = ens("bench", "--plugin", plugin, "--method", "tunable,tunable[weight=1/4]", *words)
    assert result.exit_code == 0, result.output
    first, second = json.loads(result.stdout)
    assert first["hyper"] == {"weight": 1.0, "flavour": "plain"}
    assert second["hyper"] == {"weight": 0.25, "flavour": "plain"}
    assert second["label"] == "tunable[weight=0.25]"
    assert first["training"]["key"] != second["training"]["key"]


def test_several_plugins_may_be_given_as_files_and_as_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "modules").mkdir()
    write(tmp_path / "modules", ATTACK, "as_a_module", "pass")
    file = write(tmp_path, DEFENSE, "as_a_file", "pass")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(sys.modules, "as_a_module", raising=False)
    result = ens(
        *("bench", "--plugin", file, "--plugin", "as_a_module", "--method", "as_a_file", "--attack", "as_a_module"),
        *(*SMALL, "--dry-run", "--results", tmp_path / "results"),
    )
    assert result.exit_code == 0, result.output
    assert "as_a_file" in result.stdout
    assert "as_a_module" in result.stdout


def test_a_change_of_a_formula_asks_for_a_new_training_and_a_change_of_a_comment_does_not(tmp_path: Path) -> None:
    def key(body: str) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        METHODS._registered.pop("edited", None)
        plugin = write(folder, DEFENSE, "edited", body)
        words = ("--method", "edited", "--attack", "fgsm", *SMALL, "--dry-run", "--results", tmp_path)
        result = ens("bench", "--plugin", plugin, *words)
        assert result.exit_code == 0, result.output
        return re.findall(r"\b[0-9a-f]{16}\b", result.stdout)[0]

    first = key("def predict(self, x):\n    return super().predict(x)")
    assert key('def predict(self, x):\n    """Now told."""\n    return super().predict(x)  # as before') == first
    assert key("def predict(self, x):\n    return super().predict(x) * 2") != first


@pytest.fixture
def distribution(tmp_path: Path) -> Path:
    """A folder such as pip installs into: one package, its metadata, a defence and an attack as entry points."""
    site = tmp_path / "site"
    package = site / "from_elsewhere"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    write(package, DEFENSE, "guarded", "pass").rename(package / "shield.py")
    write(package, ATTACK, "pointed", "pass").rename(package / "spear.py")
    info = site / "from_elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: from-elsewhere\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[ensdef.methods]\nguarded = from_elsewhere.shield:Plugin\n\n"
        "[ensdef.attacks]\npointed = from_elsewhere.spear:Plugin\n"
    )
    return site


def in_new_process(site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    folder = site.parent / "work"
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment(site), capture_output=True, text=True, timeout=120
    )


def test_a_defence_and_an_attack_of_an_installed_distribution_are_benched_by_name_alone(distribution: Path) -> None:
    words = ("--method", "guarded", "--attack", "pointed", *SMALL, "--json")
    finished = in_new_process(distribution, "-m", "ensdef", "bench", *words)
    assert finished.returncode == 0, finished.stderr
    (record,) = json.loads(finished.stdout)
    assert (record["method"], record["attack"]) == ("guarded", "pointed")
    assert record["robust_accuracy"] is not None


def test_an_installed_distribution_is_listed_without_importing_it(distribution: Path) -> None:
    (distribution / "from_elsewhere/__init__.py").write_text("raise SystemExit('imported')\n")
    for kind, name in (("methods", "guarded"), ("attacks", "pointed")):
        finished = in_new_process(distribution, "-m", "ensdef", "list", kind)
        assert finished.returncode == 0, finished.stderr
        assert name in finished.stdout
        assert "from-elsewhere" in finished.stdout


def test_a_broken_distribution_blocks_only_those_who_ask_for_it(distribution: Path) -> None:
    (distribution / "from_elsewhere/shield.py").write_text("raise RuntimeError('broken on purpose')\n")
    words = ("--attack", "fgsm", *SMALL, "--dry-run")
    assert in_new_process(distribution, "-m", "ensdef", "bench", "--method", "nat", *words).returncode == 0
    asked = in_new_process(distribution, "-m", "ensdef", "bench", "--method", "guarded", *words)
    assert asked.returncode == 2
    assert "broken on purpose" in asked.stderr
    assert "Traceback" not in asked.stderr


def test_the_python_surface_lists_plugins_of_all_kinds(tmp_path: Path) -> None:
    load_plugin(str(write(tmp_path, DEFENSE, "listed_defence", "pass")))
    load_plugin(str(write(tmp_path, ATTACK, "listed_attack", "pass")))
    assert "listed_defence" in ensdef.list_methods()
    assert "listed_attack" in ensdef.list_attacks()
    assert ensdef.list_methods() == sorted(ensdef.list_methods())


# --- ensdef new -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["defense", "attack"])
@pytest.mark.parametrize("name", ["fresh", "two_words", "v2"])
def test_new_writes_a_file_that_passes_the_contract_as_it_is(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = ens("new", kind, name)
    assert made.exit_code == 0, made.output
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.py"]
    checked = ens("check", name, "--plugin", f"{name}.py")
    assert checked.exit_code == 0, checked.output
    assert "FAIL" not in checked.stdout


@pytest.mark.parametrize("kind", ["defense", "attack"])
def test_what_new_writes_can_be_benched_with_the_command_it_prints(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    printed = ens("new", kind, "printed").stdout
    (command,) = [line for line in printed.splitlines() if "ensdef bench" in line]
    words = command.strip().removeprefix("ensdef ").split()
    fast = ("--attack", "fgsm") if kind == "defense" else ()
    result = ens(*[word if word != "soe" else "nat" for word in words], *fast, *SMALL)
    assert result.exit_code == 0, result.output
    assert "| printed" in result.stdout.replace("| nat", "")


@pytest.mark.parametrize("kind", ["defense", "attack"])
def test_what_new_writes_has_a_line_for_the_paper_and_lines_of_at_most_120_characters(
    kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "out.py"
    assert ens("new", kind, "styled", "--out", path).exit_code == 0
    text = path.read_text(encoding="utf-8")
    assert "Title of the paper" in str(ast.get_docstring(ast.parse(text)))
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.parametrize("kind", ["defense", "attack"])
def test_new_never_overwrites_a_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("precious\n", encoding="utf-8")
    result = ens("new", kind, "mine", "--out", path)
    assert result.exit_code == 2
    assert str(path) in result.stderr
    assert path.read_text(encoding="utf-8") == "precious\n"


@pytest.mark.parametrize(("kind", "name"), [("defense", "adp"), ("attack", "pgd")])
def test_new_refuses_a_taken_name(kind: str, name: str, tmp_path: Path) -> None:
    result = ens("new", kind, name, "--out", tmp_path / "x.py")
    assert result.exit_code == 2
    assert f"{name!r} exists already" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["defense", "attack"])
@pytest.mark.parametrize("name", ["Mine", "my-idea", "1st", "a b", "a.b", "", "idée", "a/b", "[x]"])
def test_new_refuses_a_name_that_cannot_be_one_and_tells_what_can(kind: str, name: str, tmp_path: Path) -> None:
    result = ens("new", kind, name, "--out", tmp_path / "x.py")
    assert result.exit_code == 2
    assert repr(name) in result.stderr
    assert "lower-case letters" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_new_into_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    result = ens("new", "defense", "mine", "--out", tmp_path / "nowhere/mine.py")
    assert result.exit_code == 2
    assert "nowhere" in result.stderr


# --- ensdef check ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ensdef.list_methods(), *ensdef.list_attacks()])
def test_every_built_in_plugin_keeps_the_contract(name: str) -> None:
    findings = check_plugin(name)
    assert len(findings) >= 9
    assert {finding.check: finding.message for finding in findings if not finding.ok} == {}


def test_check_prints_every_clause_and_exits_0_when_all_hold() -> None:
    result = ens("check", "fgsm")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\nok   ") + result.stdout.startswith("ok   ") == len(check_plugin("fgsm"))
    assert "FAIL" not in result.stdout


def test_check_exits_1_and_prints_what_to_do_where_a_clause_does_not_hold(tmp_path: Path) -> None:
    plugin = write(tmp_path, DEFENSE, "unwell", "def predict(self, x):\n    return super().predict(x).exp()")
    result = ens("check", "unwell", "--plugin", plugin)
    assert result.exit_code == 1
    assert "FAIL predict returns log scores\n     unwell.predict returned probabilities" in result.stdout
    assert "ok   builds" in result.stdout
    assert "Traceback" not in result.output


def test_several_names_are_checked_in_one_go() -> None:
    result = ens("check", "nat", "fgsm")
    assert result.exit_code == 0
    assert [line.partition(":")[0] for line in result.output.splitlines()] == ["nat", "fgsm"]


@pytest.mark.parametrize("arguments", [(), ("nat", "--all")])
def test_check_wants_names_or_all(arguments: tuple[str, ...]) -> None:
    result = ens("check", *arguments)
    assert result.exit_code == 2
    assert "either NAMEs or --all" in result.output


def test_check_of_an_unknown_name_is_refused_with_the_nearest() -> None:
    result = ens("check", "natt")
    assert result.exit_code == 2
    assert "'natt'" in result.stderr
    assert "'nat'" in result.stderr


def findings_of(folder: Path, template: str, body: str) -> list[Finding]:
    name = "subject"
    load_plugin(str(write(folder, template, name, body)))
    return check_plugin(name)


@pytest.mark.parametrize("template", [DEFENSE, ATTACK], ids=["defence", "attack"])
def test_the_sound_class_that_broken_ones_derive_from_keeps_the_contract(template: str, tmp_path: Path) -> None:
    findings = findings_of(tmp_path, template, "pass")
    assert [finding for finding in findings if not finding.ok] == []


def assert_caught(findings: list[Finding], causes: dict[str, str], consequences: tuple[str, ...]) -> None:
    """Each cause failed and names the fix; nothing else failed but what follows from it."""
    failed = {finding.check: finding.message for finding in findings if not finding.ok}
    assert set(causes) <= set(failed), f"not caught: {set(causes) - set(failed)}; failed: {failed}"
    assert set(failed) <= {*causes, *consequences}, failed
    for check, fix in causes.items():
        assert fix in failed[check], failed[check]


LOG_SCORES = "predict returns log scores"
DETERMINISTIC = "predict is deterministic"
ALONE = "predict treats images alone"
EVAL = "eval reaches every member"
GRADIENT = "gradient reaches the image"
SCALARS = "loss gives named scalars"
REACHES = "loss reaches every member"
LABELS = "labels do not leak into predict"
SAVING = "weights survive saving"
VIEWS = "views use the copy they are called on"
SELECTION = "selection fits the members"
TRAINS = "trains"
RESUMES = "training resumes to the same weights"
#: A clause that compares two predictions cannot hold for NaN or for noise.
COMPARISONS = (DETERMINISTIC, ALONE, LABELS, SAVING)

PLAIN_LIST = """
def __init__(self, members, hyper):
    super().__init__(members, hyper)
    self.plain = list(self.members)
    del self.members

@property
def members(self):
    return self.plain
"""

UNREGISTERED_RANDOM = """
def __init__(self, members, hyper):
    super().__init__(members, hyper)
    self.weights = torch.rand(len(self.members))

def predict(self, x):
    return combine.mixture(self.member_logits(x), self.weights.log().expand(len(x), -1))
"""

UNREGISTERED_CONSTANT = """
def __init__(self, members, hyper):
    super().__init__(members, hyper)
    self.weights = torch.full((len(self.members),), 0.5)

def predict(self, x):
    return combine.mixture(self.member_logits(x), self.weights.log().expand(len(x), -1))
"""

REMEMBERS_LABELS = """
def loss(self, batch, progress):
    self.seen = batch.y
    return super().loss(batch, progress)

def predict(self, x):
    scores = super().predict(x)
    seen = getattr(self, "seen", None)
    if seen is None or len(seen) != len(x):
        return scores
    return scores + 5 * torch.nn.functional.one_hot(seen, scores.shape[1])
"""

FOREIGN_VIEW = """
def __init__(self, members, hyper):
    super().__init__(members, hyper)
    first = self.members[0]
    self.readings = {"first": lambda x: first(x).log_softmax(dim=1)}

def views(self):
    return self.readings
"""


@pytest.mark.parametrize(
    ("body", "causes", "consequences"),
    [
        pytest.param(
            "def predict(self, x):\n    return super().predict(x).exp()",
            {LOG_SCORES: "return their log"},
            (TRAINS,),
            id="returns probabilities",
        ),
        pytest.param(
            "def predict(self, x):\n    return super().predict(x)[:, 1:]",
            {LOG_SCORES: "4 classes; expected 5"},
            (GRADIENT, TRAINS),
            id="has one class too few",
        ),
        pytest.param(
            "def predict(self, x):\n    return super().predict(x).T",
            {LOG_SCORES: "(12, C)"},
            (GRADIENT, ALONE, TRAINS),
            id="puts classes first",
        ),
        pytest.param(
            "def predict(self, x):\n    return super().predict(x) * float('nan')",
            {LOG_SCORES: "combine in log space"},
            (*COMPARISONS, GRADIENT, TRAINS),
            id="returns NaN",
        ),
        pytest.param(
            "def predict(self, x):\n    return super().predict(x + 0.1 * torch.randn_like(x))",
            {DETERMINISTIC: "remove randomness"},
            COMPARISONS,
            id="predicts at random",
        ),
        pytest.param(
            "def predict(self, x):\n    return super().predict((x - x.mean()) / x.std())",
            {ALONE: "no statistics over the batch"},
            (),
            id="normalises by its batch",
        ),
        pytest.param(
            "def predict(self, x):\n    scores = super().predict(x)\n    return scores - scores.mean(dim=0)",
            {ALONE: "no statistics over the batch"},
            (),
            id="centres scores over the batch",
        ),
        pytest.param(
            "def train(self, mode=True):\n    return self",
            {EVAL: "nn.ModuleList", ALONE: "no statistics over the batch"},
            (),
            id="stays in train mode",
        ),
        pytest.param(
            PLAIN_LIST,
            {EVAL: "nn.ModuleList", SAVING: "nn.ModuleList"},
            (ALONE, TRAINS),
            id="keeps members in a plain list",
        ),
        pytest.param(
            "@torch.no_grad()\ndef predict(self, x):\n    return super().predict(x)",
            {GRADIENT: "do not use no_grad or detach"},
            (),
            id="predicts without gradient",
        ),
        pytest.param(
            "def predict(self, x):\n    return super().predict(x.detach())",
            {GRADIENT: "do not use no_grad or detach"},
            (),
            id="detaches the image",
        ),
        pytest.param(
            "def predict(self, x):\n"
            "    scores = super().predict(x)\n"
            "    return 2.0 * torch.nn.functional.one_hot(scores.argmax(dim=1), scores.shape[1]) + 0 * scores",
            {GRADIENT: "avoid hard decisions"},
            (),
            id="decides hard",
        ),
        pytest.param(
            "def loss(self, batch, progress):\n    return super().loss(batch, progress)['ce']",
            {SCALARS: "must return a dict of named scalars"},
            (REACHES, TRAINS),
            id="loss is no dict",
        ),
        pytest.param(
            "def loss(self, batch, progress):\n    return {}",
            {SCALARS: "must return a dict of named scalars"},
            (REACHES, TRAINS),
            id="loss has no terms",
        ),
        pytest.param(
            "def loss(self, batch, progress):\n"
            "    return {'ce': member_cross_entropy(self.member_logits(batch.x), batch.y).mean(dim=1)}",
            {SCALARS: "take its mean"},
            (REACHES, TRAINS),
            id="loss term is a vector",
        ),
        pytest.param(
            "def loss(self, batch, progress):\n    return {**super().loss(batch, progress), 'extra': 1.0}",
            {SCALARS: "'extra' is float; expected a scalar tensor"},
            (REACHES, TRAINS),
            id="loss term is a float",
        ),
        pytest.param(
            "def loss(self, batch, progress):\n    return {'ce': super().loss(batch, progress)['ce'] * float('nan')}",
            {SCALARS: "'ce' is nan", TRAINS: "loss term 'ce' is nan"},
            (REACHES,),
            id="loss is NaN",
        ),
        pytest.param(
            "def loss(self, batch, progress):\n"
            "    return {'ce': member_cross_entropy(self.member_logits(batch.x)[:-1], batch.y).mean()}",
            {REACHES: "gives member 2 no gradient: it would never learn"},
            (),
            id="one member is left out of the loss",
        ),
        pytest.param(
            "def loss(self, batch, progress):\n    return {'ce': super().loss(batch, progress)['ce'].detach()}",
            {REACHES: "do not detach"},
            (TRAINS,),
            id="loss is detached",
        ),
        pytest.param(REMEMBERS_LABELS, {LABELS: "keep no labels on self"}, (), id="remembers labels"),
        pytest.param(UNREGISTERED_RANDOM, {SAVING: "register_buffer"}, (), id="keeps a random tensor unregistered"),
        pytest.param(UNREGISTERED_CONSTANT, {SAVING: "register_buffer"}, (), id="keeps a constant tensor unregistered"),
        pytest.param(FOREIGN_VIEW, {VIEWS: "build it inside views() from self"}, (), id="view of other weights"),
        pytest.param("def views(self):\n    return {}", {VIEWS: "at least one reading"}, (), id="no views"),
        pytest.param(
            "def views(self):\n    return {'first': lambda x: self.members[0](x)[:, 0]}",
            {VIEWS: "expected (12, 5)"},
            (),
            id="view of another shape",
        ),
        pytest.param(
            "def views(self):\n    return {'first': lambda x: self.members[0](x).softmax(dim=1)}",
            {VIEWS: "return their log"},
            (),
            id="view of probabilities",
        ),
        pytest.param(
            "def selection(self, x):\n    return torch.zeros(len(self.members), len(x))",
            {SELECTION: "expected (12, 3)"},
            (),
            id="selection transposed",
        ),
        pytest.param(
            "@dataclass\nclass Hyper:\n    weight: float = 1.0",
            {"builds": "decorate it with @dataclass(frozen=True)"},
            (),
            id="hyper-parameters can change",
        ),
        pytest.param(
            "def loss(self, batch, progress):\n"
            "    self.batches = [*getattr(self, 'batches', []), len(batch.y)]\n"
            "    return {name: value / len(self.batches) for name, value in super().loss(batch, progress).items()}",
            {RESUMES: "must be a parameter, a buffer (register_buffer), or a number or text on self"},
            (),
            id="remembers its batches in a list",
        ),
        pytest.param("__doc__ = None", {"tells its source": "no docstring"}, (), id="says nothing of itself"),
    ],
)
def test_a_broken_defence_fails_the_check_that_names_its_fault(
    body: str, causes: dict[str, str], consequences: tuple[str, ...], tmp_path: Path
) -> None:
    stuck = (RESUMES,) if TRAINS in (*causes, *consequences) else ()  # what cannot train cannot be taken up
    assert_caught(findings_of(tmp_path, DEFENSE, body), causes, (*consequences, *stuck))


BOX = "stays in ball and box"
IDLE = "does nothing without budget"
BREAKS = "breaks a defenceless model"
WRONG = "wrong images are never robust"
REPEATS = "repeats itself"
TRACE = "leaves no trace"
BATCHES = "batches do not matter"
GOES_ON = "goes on where it was stopped"
FROZEN = "params are frozen"


@pytest.mark.parametrize(
    ("body", "causes", "consequences"),
    [
        pytest.param(
            "def step(self, target, x_adv, y, state, threat, rng):\n    return x_adv * float('nan'), state",
            {BOX: "returned NaN; a division by a zero gradient norm"},
            (IDLE, BREAKS, WRONG, REPEATS, TRACE, BATCHES, GOES_ON),
            id="returns NaN",
        ),
        pytest.param(
            "def step(self, target, x_adv, y, state, threat, rng):\n    return x_adv[:, :, 1:], state",
            {BOX: "points of shape"},
            (IDLE, BREAKS, WRONG, REPEATS, TRACE, BATCHES, GOES_ON),
            id="returns another shape",
        ),
        pytest.param(
            "def step(self, *args):\n    torch.rand(1)\n    return super().step(*args)",
            {TRACE: "use rng"},
            (),
            id="moves the global random state",
        ),
        pytest.param(
            "def start(self, target, x, y, threat, rng):\n"
            "    return {'x_adv': x + threat.eps * (2 * torch.rand_like(x) - 1)}",
            {REPEATS: "draw from the rng it is given", TRACE: "use rng"},
            (BATCHES, GOES_ON),
            id="draws from the global random state",
        ),
        pytest.param(
            "def gradient(self, *args):\n    return -super().gradient(*args)",
            {BREAKS: "is the loss raised, not lowered?"},
            (),
            id="descends",
        ),
        pytest.param(
            "def step(self, target, x_adv, y, state, threat, rng):\n    return x_adv, state",
            {BREAKS: "fools a linear model on no image"},
            (),
            id="never moves",
        ),
        pytest.param(
            "def gradient(self, *args):\n"
            "    found = super().gradient(*args)\n"
            "    self.average = 0.9 * getattr(self, 'average', 0) + found.mean(dim=0)\n"
            "    return self.average.expand_as(found)",
            {BATCHES: "keep every state per image", GOES_ON: "keep what steps remember in the state that they return"},
            (),
            id="keeps a running mean over images",
        ),
        pytest.param(
            "def gradient(self, *args):\n    found = super().gradient(*args)\n    return found - found.mean(dim=0)",
            {BATCHES: "keep every state per image"},
            (),
            id="centres gradients over the batch",
        ),
        pytest.param(
            "def step(self, target, x_adv, y, state, threat, rng):\n"
            "    found = self.gradient(target, x_adv, y)\n"
            "    return x_adv + threat.eps / 20 * found / found.abs().mean(), state",
            {BATCHES: "keep every state per image"},
            (),
            id="scales gradients by the batch",
        ),
        pytest.param(
            "@dataclass\nclass Params:\n    steps: int = 5",
            {FROZEN: "decorate it with @dataclass(frozen=True)"},
            (),
            id="parameters can change",
        ),
        pytest.param("__doc__ = None", {"tells its source": "no docstring"}, (), id="says nothing of itself"),
    ],
)
def test_a_broken_attack_fails_the_check_that_names_its_fault(
    body: str, causes: dict[str, str], consequences: tuple[str, ...], tmp_path: Path
) -> None:
    assert_caught(findings_of(tmp_path, ATTACK, body), causes, consequences)


def test_what_raises_inside_a_plugin_is_told_as_a_failed_check(tmp_path: Path) -> None:
    findings = findings_of(tmp_path, DEFENSE, "def predict(self, x):\n    raise KeyError('oops')")
    failed = {finding.check: finding.message for finding in findings if not finding.ok}
    assert failed[LOG_SCORES] == "KeyError: 'oops'"


def test_a_defence_that_cannot_be_built_fails_its_first_check_alone(tmp_path: Path) -> None:
    body = "def __init__(self, members, hyper):\n    raise RuntimeError('no plan')"
    findings = findings_of(tmp_path, DEFENSE, body)
    assert [(finding.check, finding.ok) for finding in findings] == [("builds", False)]
    assert "no plan" in findings[0].message


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("@ensdef.register_defense('odd')\nclass Odd:\n    pass", "EnsembleDefense"),
        ("@ensdef.register_attack('odd')\nclass Odd:\n    pass", "IterativeAttack"),
        ("@ensdef.register_defense('Odd Name')\nclass Odd(ensdef.EnsembleDefense):\n    pass", "lower-case"),
    ],
)
def test_registering_what_is_no_plugin_is_refused_with_what_was_expected(
    source: str, told: str, tmp_path: Path
) -> None:
    path = tmp_path / "odd.py"
    path.write_text(f'"""Odd."""\nimport ensdef\n\n{source}\n', encoding="utf-8")
    result = ens("check", "nat", "--plugin", path)
    assert result.exit_code == 2
    assert told in result.stderr
    assert "odd.py" in result.stderr


def test_checks_leave_the_global_random_state_and_gradient_mode_alone() -> None:
    import torch

    state: Any = torch.random.get_rng_state()
    check_plugin("nat")
    check_plugin("pgd")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.is_grad_enabled()
