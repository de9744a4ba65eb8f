"""What attacks of other libraries share: the model they see, their random numbers, their parameters read from text."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
import random
import types
import typing
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args, get_origin

import numpy as np
import torch
from ensdef.attacks._pyautoattack import as_plain_model
from torch import nn

from ensdef.errors import UsageError
from ensdef.target import Target


def library(name: str, attack: str) -> Any:
    """An optional package.

    Raises:
        UsageError: it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = "foolbox" if name == "numba" else name.partition(".")[0]
        raise UsageError(
            f"{attack} needs {name}, which cannot be imported ({error}); install it with "
            f"`pip install 'ensdef[{extra}]'`"
        ) from None


class ModelForLibrary(nn.Module):
    """The target as a module that has a parameter, by which libraries find out the device; it is asked for nothing."""

    def __init__(self, target: Target, device: torch.device) -> None:
        super().__init__()
        self.plain = as_plain_model(target)
        self.device_of = nn.Parameter(torch.zeros((), device=device), requires_grad=False)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.plain(x)
        return scores


@contextmanager
def guarded(seed: int, kept: list[str]) -> Iterator[None]:
    """Seeds every global generator for the library and restores them; what it warns of goes to ``kept``, each once.

    Also keeps ``logging.info`` of a library from installing a handler on the root logger.
    """
    states = np.random.get_state(), random.getstate()
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            yield
        for warning in seen:
            if issubclass(warning.category, UserWarning | RuntimeWarning) and str(warning.message) not in kept:
                kept.append(str(warning.message))
    finally:
        root.removeHandler(handler)
        np.random.set_state(states[0])
        random.setstate(states[1])


def params_from(cls: type, owner: str, without: Collection[str]) -> type:
    """A frozen dataclass of those constructor parameters that can be written as text.

    Args:
        cls: a library's attack.
        owner: its name here, for the messages.
        without: parameters that are not the user's to set.
    Raises:
        UsageError: the constructor needs something that has no default, such as another attack.
    """
    fields: list[tuple[str, Any, Any]] = []
    hints = _hints(cls)
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.name in without or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        hint = _readable(hints.get(parameter.name), parameter.default)
        if hint is not None and parameter.default is not parameter.empty:
            default = tuple(parameter.default) if isinstance(parameter.default, list) else parameter.default
            fields.append((parameter.name, hint, dataclasses.field(default=default)))
        elif parameter.default is parameter.empty:
            raise UsageError(f"{owner} has no default for {parameter.name}, which it needs; take another class")
    made = dataclasses.make_dataclass(f"{cls.__name__}Params", fields, frozen=True)
    made.__doc__ = f"Constructor parameters of {cls.__module__.partition('.')[0]}'s {cls.__name__}."
    made.__module__ = __name__
    return made


def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    except (NameError, TypeError):
        return {}


def _readable(hint: Any, default: Any) -> Any:
    """The annotation, or what the default value tells, as a type that is read from text; None: no such type."""
    if hint is not None:
        return hint if _is_readable(hint) else None
    if isinstance(default, bool | str):
        return type(default)
    if isinstance(default, int | float):
        return int | float  # libraries write 1 where they mean 1.0
    if isinstance(default, list | tuple) and default and all(isinstance(item, int | float) for item in default):
        return tuple[int | float, ...]
    return None


def _is_readable(hint: Any) -> bool:
    if get_origin(hint) in (typing.Union, types.UnionType):
        return all(_is_readable(option) for option in get_args(hint) if option is not type(None))
    return hint in (bool, int, float, str) or (
        get_origin(hint) is Literal and all(isinstance(choice, str) for choice in get_args(hint))
    )
