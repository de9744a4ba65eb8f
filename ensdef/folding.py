"""Batch norm folded into the convolution before it: the same function in eval mode, fewer and faster kernels.

Folded wherever the order is certain: a plain ``nn.Sequential`` in which a convolution is directly followed by a
batch norm with running statistics, and neither has hooks. Anything else is left as it is.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_PLAIN = (bool, int, float, str, type(None))


class FoldedCopy:
    """A frozen eval-mode copy of ``source`` with folded batch norms, refreshed from it on demand.

    ``module`` computes what ``source.eval()`` computes, to float rounding (about 2e-7 of the output). A refresh takes
    over parameters, buffers and plain attributes (numbers, texts, None), such as ``begin_epoch`` sets.
    """

    def __init__(self, source: nn.Module) -> None:
        self.source = source
        self.module = frozen_copy(source)
        self._twins = list(zip(source.modules(), self.module.modules(), strict=True))
        self._pairs: list[tuple[Any, Any, Any]] = []
        folded: set[int] = set()
        for (theirs, index), (ours, _) in zip(list(_foldable(source)), list(_foldable(self.module)), strict=True):
            conv: Any = ours[index]
            self._pairs.append((theirs[index], theirs[index + 1], conv))
            if conv.bias is None:
                conv.bias = nn.Parameter(conv.weight.new_zeros(len(conv.weight)), requires_grad=False)
            ours[index + 1] = nn.Identity().eval()
            folded.update({id(theirs[index].weight), id(theirs[index].bias)})
        theirs_by_name = dict(
            [*source.named_parameters(remove_duplicate=False), *source.named_buffers(remove_duplicate=False)]
        )
        ours_by_name = dict([*self.module.named_parameters(), *self.module.named_buffers()])
        plain = [name for name in ours_by_name if name in theirs_by_name and id(theirs_by_name[name]) not in folded]
        self._from = [theirs_by_name[name].detach() for name in plain]
        self._to = [ours_by_name[name].detach() for name in plain]
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> nn.Module:
        """Take over the source's present weights; returns ``module``."""
        for ours, theirs in zip(self._to, self._from, strict=True):
            ours.copy_(theirs)
        for conv, norm, ours in self._pairs:
            weight, bias = fused(conv, norm)
            ours.weight.copy_(weight)
            ours.bias.copy_(bias)
        for original, twin in self._twins:
            vars(twin).update(plain_attributes(original))
        return self.module


def plain_attributes(module: nn.Module) -> dict[str, bool | int | float | str | None]:
    """Numbers, texts and None that a module keeps as public attributes, but for ``training``."""
    return {
        name: value
        for name, value in vars(module).items()
        if name != "training" and not name.startswith("_") and isinstance(value, _PLAIN)
    }


def frozen_copy(module: nn.Module) -> nn.Module:
    """A deep copy in eval mode whose parameters ask for no gradient."""
    duplicate = copy.deepcopy(module).eval()
    for parameter in duplicate.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return duplicate


def fused(conv: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of the single convolution that equals ``norm(conv(x))`` in eval mode."""
    mean, variance = norm.running_mean, norm.running_var
    scale = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -mean * scale if conv.bias is None else (conv.bias - mean) * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    weight = conv.weight * scale.view(-1, *[1] * (conv.weight.dim() - 1))
    return weight, shift


def _hooked(m: nn.Module) -> bool:
    return bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


def _foldable(module: nn.Module) -> Iterator[tuple[nn.Sequential, int]]:
    uses = Counter(id(part) for _, part in module.named_modules(remove_duplicate=False))
    uses.update(id(parameter) for part in module.modules() for parameter in part._parameters.values())
    for part in module.modules():
        if type(part) is nn.Sequential:
            for index in range(len(part) - 1):
                conv, norm = part[index], part[index + 1]
                if (
                    type(conv) in _CONVOLUTIONS
                    and type(norm) in _NORMS
                    and norm.running_mean is not None
                    and not any(_hooked(m) for m in (conv, norm))
                    and uses[id(conv)] == 1
                    and uses[id(conv.weight)] == 1
                ):
                    yield part, index
