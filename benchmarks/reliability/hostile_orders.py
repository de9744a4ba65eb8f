"""Command lines and protocols that somebody hostile, or somebody tired, may write."""

from __future__ import annotations

import json
from typing import Any

from hostile import ATTACK_CALLS, METHOD_CALLS, PLAIN, TEXTS, VALUES, Draw, Input, alike, at, places
from hypothesis import strategies as st
from victims import Victims

from ensdef.cli import cli

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
        owner, name = draw(st.sampled_from(list(places(content))))
        at(content, owner)[name] = draw(alike(at(content, owner)[name]))
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
