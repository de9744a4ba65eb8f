"""Hostile inputs, drawn with hypothesis: good ones with something changed, and whether the change is nonsense."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from hypothesis import strategies as st
from victims import Victims

import ensdef
from ensdef.cli import cli, compare, explain, import_pth, inspect, measure, plot, plugins, report, run  # noqa: F401
from ensdef.errors import UsageError
from ensdef.keys import content_key
from ensdef.registry import ATTACKS, METHODS, Registry

Draw = Callable[[st.SearchStrategy[Any]], Any]

#: Texts that found their way into paths, tables, pages and numbers elsewhere.
TEXTS = st.one_of(
    st.sampled_from(
        [
            *(
                "",
                " ",
                "..",
                "../../outside/secret",
                "/etc/passwd",
                "\0",
                "a\nb",
                "\ud800",
                "-",
                "--",
                "[",
                "]",
                "[[]]",
            ),
            *(
                "nan",
                "inf",
                "-1",
                "1e999999999",
                "8/0",
                "9" * 5000,
                "true",
                "none",
                "eps/0",
                "</script><script>",
                "|",
                "\\",
            ),
            *(
                "pgd[steps=99999999999]",
                "pgd[steps=-1]",
                "pgd[steps=1",
                "torchattacks.__class__",
                "os.system",
                "*",
                "nat,nat",
            ),
            *(
                "$x^$ \\frac{ $",
                "javascript:alert(1)",
                "{{7*7}}",
                "%s%n",
                "$(touch x)",
                "`touch x`",
                "\u202e",
                "x" * 10_000,
            ),
        ]
    ),
    st.text(max_size=30),
)
NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70), st.integers(-3, 3), st.floats(), st.sampled_from([10**400, 1e308, -0.0, 5e-324])
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)


#: What a number may be where one is expected.
PLAIN = st.one_of(
    st.integers(-2, 5), st.floats(0, 2), st.sampled_from(["eps/5", "8/255", "1e-300", "0", "2**3", "1_0"])
)


@st.composite
def calls(draw: Draw, registry: Registry[Any], parameters: str) -> str:
    """A plug-in by name, with some of its own parameters at values that it may or may not take."""
    name = draw(st.sampled_from(registry.names()))
    known = [one.name for one in dataclasses.fields(getattr(registry.get(name), parameters))]
    chosen = draw(st.lists(st.sampled_from(known), max_size=2, unique=True)) if known else []
    inside = ",".join(f"{one}={draw(st.one_of(PLAIN, PLAIN, TEXTS))}" for one in chosen)
    return f"{name}[{inside}]" if inside else name


METHOD_CALLS, ATTACK_CALLS = calls(METHODS, "Hyper"), calls(ATTACKS, "Params")


def alike(value: Any) -> st.SearchStrategy[Any]:
    """Values of the same type, so that what is refused is refused for what it says."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.one_of(st.integers(-5, 50), st.integers(-(2**62), 2**62))
    if isinstance(value, float):
        return st.one_of(st.floats(-1, 2), st.floats(allow_nan=False, allow_infinity=False))
    if isinstance(value, str):
        return TEXTS
    if isinstance(value, list):
        return st.one_of(st.permutations(value), st.just([]), st.just(value[:1] * 3), st.just(value + value))
    if isinstance(value, dict):
        return st.one_of(st.just({}), st.dictionaries(TEXTS, st.one_of(PLAIN, TEXTS), max_size=3))
    return VALUES


@dataclass
class Input:
    """A command, or a checkpoint to load, with a file in another state.

    Args:
        arguments: of ``ensdef``; None: load the checkpoint in the file's folder.
        file, content: what the file holds while it is tried.
        nonsense: why it must not succeed; empty: it may.
    """

    folder: Path
    arguments: list[str] | None
    file: Path | None = None
    content: bytes = b""
    nonsense: str = ""
    output: str = field(default="", repr=False)

    def __str__(self) -> str:
        shown = f" with {self.file.name} = {self.content[:600]!r}" if self.file else ""
        return (
            f"{self.arguments or 'load_checkpoint'}{shown} [{self.nonsense or 'may succeed'}]\n  {self.output[-300:]}"
        )

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """With the file as it shall be, in the working directory."""
        before = self.file.read_bytes() if self.file is not None and self.file.is_file() else None
        there = os.getcwd()
        os.chdir(self.folder)
        try:
            if self.file is not None:
                self.file.write_bytes(self.content)
            yield
        finally:
            os.chdir(there)
            if self.file is not None:
                if before is None:
                    self.file.unlink()
                else:
                    self.file.write_bytes(before)

    def run_in_place(self) -> int:
        """Exit status of a good command.

        Raises:
            RuntimeError: it failed.
        """
        with self.in_place():
            status, told = self.run()
        if status or told:
            raise RuntimeError(f"{self}\n{told}")
        return status

    def run(self) -> tuple[int, str]:
        """Exit status, and the traceback if there was one."""
        if self.arguments is None:
            assert self.file is not None
            try:
                ensdef.load_checkpoint(self.file.parent)
            except UsageError as error:
                self.output = str(error)
                return 2, ""
            except BaseException:
                return 1, traceback.format_exc(limit=-6)
            return 0, ""
        found = CliRunner().invoke(cli, self.arguments)
        self.output = found.output
        if found.exception is not None and not isinstance(found.exception, SystemExit):
            return 1, "".join(traceback.format_exception(found.exception)[-7:])
        return found.exit_code, ""


# command lines

READING = (
    ("list", "methods"),
    ("list", "protocols"),
    ("explain",),
    ("explain", "zero_gradient"),
    ("table", "grid"),
    ("table", "board"),
    ("table", "--all"),
    ("compare", "nat", "soe"),
    ("power", "--difference", "1"),
    ("plot", "robustness"),
    ("plot", "--list"),
    ("bench", "--method", "nat", "--attack", "pgd", "--dry-run"),
    ("run", "default", "--dry-run"),
    (
        *(
            "import-pth",
            "theirs.pth",
            "--method",
            "nat",
            "--arch",
            "small_resnet[width=4]",
            "--out",
            "results/imported",
        ),
        *("--classes", "3", "--image", "1,8,8"),
    ),
)
#: Options that name another place to write to, code to run, or machines to talk to: asked for, they may do so.
TRUSTED = {"--results", "--out", "--plugin", "--executor", "--ray-address", "--data-dir", "--cost", "--help"}
#: Option values that no command may take, whatever else it is told.
NONSENSE = (
    *(("--method", text) for text in ("no_such", "nat[", "nat[x=1]", "nat,,soe", "../nat", "")),
    *(
        ("--attack", text)
        for text in ("no_such", "pgd[steps=-1]", "pgd[steps=1", "pgd[nothing=1]", "pgd[steps=1,steps=2]")
    ),
    *(("--eps", text) for text in ("-0.1", "nan", "8", "1/0", "1e999999999", "a", "")),
    *(("--seed", text) for text in ("-1", "0.5", "a", "99999999999999999999")),
    *(("--members", text) for text in ("0", "-3", "a")),
    *(("--arch", text) for text in ("no_such", "resnet[depth=7]", "resnet20[")),
    *(("--samples", text) for text in ("0", "-1", "1e3", "99999999")),
    *(("--limit", text) for text in ("0", "-5", "99999999")),
    *(("--epochs", text) for text in ("0", "-1")),
    *(("--train-eps", text) for text in ("-1", "uniform(1)", "uniform(0.2,0.1)", "x")),
    *(("--norm", "l7"), ("--combiner", "best"), ("--dataset", "no_such"), ("--precision", "fp8"), ("--health", "no")),
    *(("--attack-seed", "-1"), ("--batch-size", "0"), ("--devices", "0"), ("--config", "no_such.toml")),
)


def command_line(draw: Draw, victims: Victims) -> Input:
    """A reading command with options added, changed, doubled or cut."""
    if draw(st.booleans()):
        wrong = draw(st.sampled_from(NONSENSE))
        return Input(
            victims.folder,
            ["bench", "--method", "nat", "--attack", "pgd", "--dry-run", *wrong],
            nonsense=" ".join(wrong),
        )
    arguments = list(draw(st.sampled_from(READING)))
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["option", "text", "cut", "double"]))
        place = draw(st.integers(1, len(arguments)))
        if kind == "option":
            option = draw(st.sampled_from(_options(arguments[0])))
            values = {"--method": METHOD_CALLS, "--attack": ATTACK_CALLS}.get(option, TEXTS)
            arguments += [option, str(draw(st.one_of(values, PLAIN, TEXTS)))]
        elif kind == "text":
            arguments.insert(place, draw(TEXTS))
        elif kind == "cut" and place < len(arguments):
            del arguments[place]
        elif kind == "double":
            arguments += arguments[place:]
    # a command line holds no null characters, and these options name other places to write to
    arguments = [text.replace("\0", "").encode("utf-8", "replace").decode() for text in arguments]
    if arguments[0] in ("bench", "run") and "--dry-run" not in arguments:
        arguments.insert(1, "--dry-run")
    return Input(victims.folder, arguments)


def _options(command: str) -> list[str]:
    """Options of a command, and one that no command has."""
    known = cli.commands[command].params if command in cli.commands else []
    named = [name for one in known for name in one.opts if name.startswith("--")]
    return [*(name for name in named if name not in TRUSTED), "--no-such-option"]


# protocols

#: Values that make a protocol nonsense, by key.
WRONG: tuple[tuple[str, Any], ...] = (
    *(("methods", value) for value in ("nat", 5, [5], ["no_such"], [{"arch": "resnet8"}], ["nat["])),
    *(("attacks", value) for value in ("pgd", [5], ["no_such"], [{"norm": "l2"}], [{"call": "pgd", "x": 1}])),
    *(("eps", value) for value in ("-1", "a", [-0.1], {"a": 1}, True)),
    *(("seeds", value) for value in (0, [-1], [0.5], ["a"], [True])),
    *(("members", value) for value in (0, -1, "a", [3], 0.5)),
    *(("samples", value) for value in (0, -1, "a", [3], 10**9)),
    *(("version", value) for value in ("a", [1])),
    *(
        ("norm", "l9"),
        ("dataset", "no_such"),
        ("kind", "poem"),
        ("nonsense", 1),
        ("recipe", [1]),
        ("recipe", {"lrr": 1}),
    ),
    *(("scales", value) for value in ("smoke", {"huge": {}}, {"../../outside/secret": {}}, {"smoke": 1})),
    *(("recipe", {"attack": {"steps": -1}}), ("recipe", {"lr": "fast"}), ("epochs", 0), ("train_eps", "x")),
    *(("plugin", "evil.py"), ("plugins", ["evil.py"]), ("measures", ["no_such"]), ("search", "fp4"), ("combiner", "x")),
)


def protocol(draw: Draw, victims: Victims) -> Input:
    """A protocol with a key changed, taken out or added, or with its text damaged."""
    import tomllib

    file, nonsense = victims.results / "fuzzed.toml", ""
    arguments = ["run", str(file), "--dry-run"]
    kind = draw(st.sampled_from(["wrong", "value", "alike", "alike", "calls", "calls", "text", "cut"]))
    content = tomllib.loads(victims.protocol)
    if kind == "wrong":
        key, value = draw(st.sampled_from(WRONG))
        if key == "measures":
            del content["attacks"]
        content[key], nonsense = value, f"{key} = {value!r}"
        text = toml(content)
    elif kind == "value":
        content[draw(st.sampled_from([*content, "data_dir", "arch", "scale", "image_size"]))] = draw(VALUES)
        text = toml(content)
    elif kind == "alike":
        owner, name = draw(st.sampled_from(list(_places(content))))
        _at(content, owner)[name] = draw(alike(_at(content, owner)[name]))
        text = toml(content)
    elif kind == "calls":
        content["methods"] = draw(st.lists(METHOD_CALLS, min_size=1, max_size=2))
        content["attacks"] = draw(st.lists(ATTACK_CALLS, min_size=1, max_size=2))
        text = toml(content)
    elif kind == "cut":
        text = victims.protocol[: draw(st.integers(0, len(victims.protocol)))]
    else:
        place = draw(st.integers(0, len(victims.protocol)))
        text = victims.protocol[:place] + draw(TEXTS) + victims.protocol[place:]
    return Input(victims.folder, arguments, file, text.encode("utf-8", "surrogatepass"), nonsense)


def toml(content: dict[str, Any]) -> str:
    """TOML, as far as its notation goes; JSON's strings are TOML's."""

    def text(one: Any) -> str:
        return json.dumps(str(one), ensure_ascii=False)

    def value(one: Any) -> str:
        if isinstance(one, dict):
            return (
                "{"
                + ", ".join(f"{json.dumps(str(key), ensure_ascii=False)} = {value(item)}" for key, item in one.items())
                + "}"
            )
        if isinstance(one, list | tuple):
            return "[" + ", ".join(map(value, one)) + "]"
        if isinstance(one, float):
            return repr(one)
        if isinstance(one, str):
            return text(one)
        return json.dumps(one) if one is not None else '"none"'

    return "\n".join(f"{text(key)} = {value(item)}" for key, item in content.items())


# files of the results folder


def json_changed(draw: Draw, victims: Victims, kind: str) -> Input:
    """A record, measurement, manifest or description with one value changed, or with its text damaged."""
    file: Path = getattr(victims, kind)
    good = file.read_bytes()
    arguments = _reader(draw, victims, kind)
    body = json.loads(good)
    how = draw(st.sampled_from(["value", "alike", "alike", "alike", "wrong", "cut", "bytes", "missing", "text"]))
    nonsense = ""
    if how == "cut":
        content, nonsense = good[: draw(st.integers(0, len(good) - 3))], "half a file"
    elif how == "bytes":
        place = draw(st.integers(0, len(good) - 1))
        content = good[:place] + draw(st.binary(min_size=1, max_size=8)) + good[place + draw(st.integers(0, 4)) :]
    elif how == "text":
        content, nonsense = draw(
            st.sampled_from(
                [(b"[" * 200_000, "brackets"), (b'{"a":' * 5000, "brackets"), (b"", "nothing"), (b"null", "null")]
            )
        )
    else:
        owner, name = draw(st.sampled_from(list(_places(body))))
        changed = copy.deepcopy(body)
        target = _at(changed, owner)
        if how == "missing":
            del target[name]
        elif how == "value":
            target[name] = draw(VALUES)
        elif how == "alike":
            target[name] = draw(alike(target[name]))
        else:
            nonsense = _make_wrong(draw, changed, kind)
        if kind == "measurement" and "checksum" in changed and draw(st.booleans()):
            with contextlib.suppress(TypeError, ValueError):
                rest = {key: value for key, value in changed.items() if key != "checksum"}
                changed["checksum"] = content_key({**rest, "path": None})
                nonsense = ""  # who can edit a file can make its checksum too
        content = json.dumps(changed).encode("utf-8", "surrogatepass")
    return Input(victims.folder, arguments, file, content, nonsense)


def _reader(draw: Draw, victims: Victims, kind: str) -> list[str] | None:
    """A command that reads the file."""
    if kind == "checkpoint":
        return None
    if kind == "measurement":
        return draw(st.sampled_from([["table", "measures"], ["table", "--all"]]))
    if kind == "manifest":
        return draw(st.sampled_from([["table", "grid"], ["table", "--all"], ["plot", "robustness", "--table", "grid"]]))
    commands = [["table", "grid"], ["table", "board"], ["compare", "nat", "soe"], ["plot", "robustness"], ["report"]]
    return draw(st.sampled_from(commands))


def _at(body: Any, owner: tuple[Any, ...]) -> Any:
    """The table or list that is nested there."""
    for step in owner:
        body = body[step]
    return body


def _places(body: Any, owner: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value of nested tables and lists, by the way to it; of long lists the first few."""
    items = body.items() if isinstance(body, dict) else enumerate(body[:3]) if isinstance(body, list) else ()
    for name, value in items:
        yield owner, name
        yield from _places(value, (*owner, name))


def _make_wrong(draw: Draw, body: dict[str, Any], kind: str) -> str:
    """Change a file so that it cannot be right, in place; says how."""
    changes: dict[str, list[tuple[str, Callable[[], Any]]]] = {
        "record": [
            ("another accuracy", lambda: body.update(robust_accuracy=body["robust_accuracy"] + 0.01)),
            ("another n", lambda: body.update(n=body["n"] + 1)),
            ("a shorter list", lambda: body["outcomes"]["robust"].pop()),
            ("an image twice", lambda: body["outcomes"]["ids"].__setitem__(0, body["outcomes"]["ids"][1])),
            ("robust but wrong", lambda: body["outcomes"]["robust"].__setitem__(body["outcomes"]["clean"].index(0), 1)),
            ("another standard error", lambda: body.update(stderr=0.5)),
            ("a data set that is a path", lambda: body.update(dataset="../../outside")),
            ("a method that is a path", lambda: body.update(method="/tmp/x")),
            ("an accuracy in words", lambda: body.update(clean_accuracy="all")),
            ("flags that are none", lambda: body.update(flags=[{"flag": 3}])),
            ("another format", lambda: body.update(format=99)),
        ],
        "measurement": [
            ("another value", lambda: body["values"].update(seconds=99.0)),
            ("another name", lambda: body.update(label="other")),
            ("another format", lambda: body.update(format=0)),
        ],
        "manifest": [
            ("a path that leads out", lambda: body["records"].append("../outside/secret.json")),
            ("an absolute path", lambda: body["records"].append("/etc/passwd")),
            ("a record that is not there", lambda: body["records"].append("records/digits/nat/none.json")),
            ("records that are no list", lambda: body.update(records=5)),
            ("paths that are no texts", lambda: body.update(records=[["a"]])),
            ("another kind", lambda: body.update(kind="poem")),
        ],
        "checkpoint": [
            ("a million members", lambda: body["model"].update(members=10**6)),
            ("more members", lambda: body["model"].update(members=3)),
            ("another number of classes", lambda: body["model"].update(num_classes=10)),
            ("a wide network", lambda: body["model"]["architecture_params"].update(width=10**9)),
            ("an unknown method", lambda: body["model"].update(method="../../nat")),
            ("an unknown architecture", lambda: body["model"].update(architecture="os.system")),
            ("a shape of words", lambda: body["model"].update(image_shape="huge")),
            ("no model", lambda: body.pop("model")),
        ],
    }
    told, change = draw(st.sampled_from(changes[kind]))
    change()
    return told


def bytes_changed(draw: Draw, victims: Victims) -> Input:
    """Weights, or somebody's pickle, with bytes changed or cut off."""
    ours = draw(st.booleans())
    file = victims.checkpoint.parent / "weights.safetensors" if ours else victims.pth
    good = file.read_bytes()
    if draw(st.booleans()):
        content = good[: draw(st.integers(0, len(good) - 1))]
        nonsense = "half a file"
    else:
        head = draw(st.integers(0, min(len(good), 4000) - 1))
        content = good[:head] + draw(st.binary(min_size=1, max_size=16)) + good[head + draw(st.integers(0, 16)) :]
        nonsense = ""
    if ours:
        return Input(victims.folder, None, file, content, nonsense)
    arguments = ["import-pth", str(file), "--method", "nat", "--arch", "small_resnet[width=4]", "--classes", "3"]
    arguments += ["--image", "1,8,8", "--out", str(victims.results / f"imported-{draw(st.integers(0, 2**40))}")]
    return Input(victims.folder, arguments, file, content, nonsense)
