"""Files of a results folder, and other people's pickles, with something changed."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile import VALUES, Draw, Input, alike, at, places
from hypothesis import strategies as st
from victims import Victims

from ensdef.keys import content_key


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
        owner, name = draw(st.sampled_from(list(places(body))))
        changed = copy.deepcopy(body)
        target = at(changed, owner)
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
