"""From the tensors of other people's files to a defence of ours: by structure alone, whatever the names are.

- Components that all names begin with (``state_dict``, ``module``, ``model``) say nothing and are dropped.
- ``model_0``, ``expert_1``, ``models.2``: groups that are numbered from 0 and have the same tensors are members.
  Several files are a member each.
- ``mean`` and ``std`` with a value a channel are a normaliser inside; without them it has to be told.
- Within a network tensors are matched in their order: kind (weight, bias, running mean and variance) and shape of
  every one must agree. Names of layers differ between code bases, their order seldom; a network that computes its
  layers in another order has other shapes somewhere.
- What stands beside the members (a gate) goes to what the defence has beside its members.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ensdef.errors import CheckpointError, UsageError

Tensors = Mapping[str, Tensor]
_KINDS = ("weight", "bias", "running_mean", "running_var")
_NORMALISER = ("mean", "std")


@dataclass(frozen=True)
class Layout:
    """What files hold.

    Args:
        members: tensors of each, by name, prefixes and normaliser removed, in the order of the file.
        rest: the same of what stands beside the members.
        mean, std: of the normaliser inside, per channel; None: there is none.
    """

    members: tuple[Tensors, ...]
    rest: Tensors
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def layout_of(files: Sequence[Tensors]) -> Layout:
    """Members, what stands beside them, and the normaliser.

    Args:
        files: tensors by dotted name, of one file with all members, or of several with one each.
    Raises:
        CheckpointError: several files of which one has several members, or normalisers that differ.
    """
    members: list[Tensors] = []
    rest: Tensors = {}
    for every in files:
        tensors = {name: tensor for name, tensor in every.items() if name.rpartition(".")[2] in (*_KINDS, *_NORMALISER)}
        found, beside = _numbered(_unwrapped(tensors))
        if len(files) > 1 and (len(found) > 1 or beside):
            raise CheckpointError(
                f"one of {len(files)} files has {len(found)} members itself ({_some(tensors)}); give that file alone"
            )
        members += found
        rest = beside or rest
    normalisers, plain = zip(*(_without_normaliser(_unwrapped(member)) for member in members), strict=True)
    told = set(normalisers)
    if len(told) > 1:
        raise CheckpointError(f"members normalise their images in {len(told)} ways; expected one")
    mean, std = told.pop()
    return Layout(plain, _without_normaliser(_unwrapped(rest))[1], mean, std)


def _unwrapped(tensors: Tensors) -> Tensors:
    """Without the components that all names begin with."""
    while len(tensors) > 1 and all("." in name for name in tensors):
        if len({name.partition(".")[0] for name in tensors}) > 1:
            break
        tensors = {name.partition(".")[2]: tensor for name, tensor in tensors.items()}
    return tensors


def _numbered(tensors: Tensors) -> tuple[list[Tensors], Tensors]:
    """Groups numbered from 0 with the same tensors each, and what is in none; a single network is one group."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        head, _, tail = name.partition(".")
        groups.setdefault(head, {})[tail] = tensor
    stems: dict[str, dict[int, str]] = {}
    for head in groups:
        if match := re.fullmatch(r"(.*?)[_-]?(\d{1,4})", head):
            stems.setdefault(match[1], {})[int(match[2])] = head
    for numbered in stems.values():
        members = [groups[numbered[number]] for number in sorted(numbered)]
        shapes = [[(name, tensor.shape) for name, tensor in _learned(member).items()] for member in members]
        others = [head for head in groups if head not in numbered.values()]
        # a network whose layers are numbered has other tensors beside them, and no gate has a stem of its own
        if sorted(numbered) == list(range(len(members))) and all(one == shapes[0] for one in shapes) and shapes[0]:
            if len(others) > 1 or any(not all(tail for tail in groups[head]) for head in others):
                continue
            if len(members) > 1 or not others:
                rest = {f"{head}.{tail}": tensor for head in others for tail, tensor in groups[head].items()}
                return list(members), rest
    return [tensors], {}


def _without_normaliser(tensors: Tensors) -> tuple[tuple[tuple[float, ...] | None, ...], Tensors]:
    """Mean and standard deviation, and the tensors that are learned."""
    found: dict[str, tuple[float, ...]] = {}
    for name, tensor in tensors.items():
        if (last := name.rpartition(".")[2]) in _NORMALISER and tensor.is_floating_point() and tensor.numel() <= 4:
            found[last] = tuple(round(float(value), 6) for value in tensor.flatten())
    if len(found) == 1:
        raise CheckpointError(f"a normaliser with {' and '.join(found)} alone; expected both mean and std")
    return (found.get("mean"), found.get("std")), _learned(tensors)


def _learned(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] in _KINDS}


def fitted(own: Tensors, layout: Layout, mean: Sequence[float], std: Sequence[float]) -> dict[str, Tensor]:
    """The state dict of a defence with the weights of others in it.

    Args:
        own: state dict of the untrained defence: ``members.<k>.<...>`` and what stands beside them.
        mean, std: per channel, of the normalisation inside our members.
    Raises:
        CheckpointError: other numbers of members, or tensors of other kinds and shapes; told by name.
    """
    members = sorted({int(name.split(".")[1]) for name in own if name.startswith("members.")})
    if len(members) != len(layout.members):
        raise CheckpointError(f"found {len(layout.members)} members, expected {len(members)}; see --members")
    state = {name: tensor.clone() for name, tensor in own.items()}
    for number, found in zip(members, layout.members, strict=True):
        prefix = f"members.{number}."
        state |= _aligned({n: t for n, t in own.items() if n.startswith(prefix)}, found, f"member {number}")
    beside = {name: tensor for name, tensor in own.items() if not name.startswith("members.")}
    state |= _aligned(beside, layout.rest, "what stands beside the members")
    for name in state:
        parts = name.split(".")
        if parts[-2:] in (["normalize", "mean"], ["normalize", "std"]):
            values = torch.tensor(mean if parts[-1] == "mean" else std, dtype=torch.float32)
            state[name] = values.expand(state[name].shape[1]).clone().view(state[name].shape)
    return state


def _aligned(own: Tensors, found: Tensors, what: str) -> dict[str, Tensor]:
    """Tensors matched in their order."""
    expected = [(name, tensor) for name, tensor in own.items() if name.rpartition(".")[2] in _KINDS]
    if len(expected) != len(found):
        raise CheckpointError(
            f"{what}: found {len(found)} tensors ({_some(found)}), expected {len(expected)} ({_some(dict(expected))})"
        )
    state = {}
    for (name, ours), (other, theirs) in zip(expected, found.items(), strict=True):
        if name.rpartition(".")[2] != other.rpartition(".")[2] or ours.shape != theirs.shape:
            raise CheckpointError(
                f"{what}: found {other} {tuple(theirs.shape)} where {name} {tuple(ours.shape)} is expected; "
                "is this the architecture?"
            )
        if not theirs.is_floating_point() or not bool(torch.isfinite(theirs).all()):
            raise CheckpointError(f"{what}: {other} has NaN, infinite or whole numbers; expected finite weights")
        state[name] = theirs.detach().to(ours.dtype).contiguous().clone()
    return state


def _some(tensors: Tensors) -> str:
    shown = [f"{name} {tuple(tensor.shape)}" for name, tensor in list(tensors.items())[:3]]
    return ", ".join(shown) + (f" and {len(tensors) - 3} more" if len(tensors) > 3 else "") or "none"


def channels(values: str, what: str) -> tuple[float, ...]:
    """``"0.49,0.48,0.45"`` as numbers.

    Raises:
        UsageError: something else.
    """
    from ensdef.notation import fraction, split_list

    numbers = tuple(float(fraction(part, what)) for part in split_list(values))
    if what == "--std" and min(numbers) <= 0:
        raise UsageError(f"--std is {values}; expected positive numbers")
    return numbers
