"""The attacked model as an attack sees it: a frozen copy that remembers what it was asked and counts the passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

from ensdef.combine import COMBINERS
from ensdef.defense import EnsembleDefense
from ensdef.errors import UsageError
from ensdef.folding import FoldedCopy, frozen_copy

View = Callable[[Tensor], Tensor]
T = TypeVar("T")


@dataclass
class PassCounter:
    """Member passes, counted in images: one forward of 3 members on 10 images is 30.

    ``share`` is the part of the rows that counts; the rest is padding.
    """

    forwards: int = 0
    backwards: int = 0
    share: float = 1.0

    def watch(self, member: nn.Module) -> None:
        """Count every pass through ``member`` from now on."""

        def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            size = round(len(inputs[0]) * self.share)
            self.forwards += size
            tensors = [
                part
                for part in (output if isinstance(output, tuple) else (output,))
                if isinstance(part, Tensor) and part.requires_grad
            ]

            def count_backward(gradient: Tensor) -> None:
                self.backwards += size

            if tensors:  # once a backward pass, through however many of the outputs it comes
                register_multi_grad_hook(tensors, count_backward, mode="any")

        member.register_forward_hook(count)


class Target:
    """A model prepared for attack: deep copy, eval mode, no parameter gradients.

    Args:
        model: a defence, or any module from images in [0, 1] to scores (B, C).
        combiner: ``"native"`` (the model's own ``predict``) or a rule of :data:`ensdef.combine.COMBINERS`.
        fold: fold batch norms and use the channels-last layout: the same function to float rounding, faster.
        device: where the copy lives; the model stays where it is.
        precision: ``"fp32"``, or ``"bf16"`` for an approximate search whose successes are judged elsewhere.

    ``target(x)`` is what success is judged on; ``views`` are further differentiable readings of the same weights.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        combiner: str = "native",
        fold: bool = True,
        precision: str = "fp32",
        device: torch.device | str = "cpu",
    ) -> None:
        if combiner != "native" and not isinstance(model, EnsembleDefense):
            raise UsageError(f"combiner is {combiner}, but a {type(model).__name__} has no members; expected native")
        self.module = (FoldedCopy(model).module if fold else frozen_copy(model)).to(device)
        self.combiner = combiner
        self.precision = precision
        self.memory_format = torch.channels_last if fold else torch.contiguous_format
        if fold:
            for part in self.module.modules():
                if isinstance(part, nn.Conv2d):
                    part.to(memory_format=torch.channels_last)
        if precision == "bf16":
            for part in self.module.modules():
                if isinstance(part, nn.Conv2d | nn.Linear):
                    part.to(torch.bfloat16)
        self.passes = PassCounter()
        members = self.module.members if isinstance(self.module, EnsembleDefense) else [self.module]
        for member in members:
            self.passes.watch(member)
        self._evaluated: list[tuple[Tensor, int, Tensor]] = []

    def __call__(self, x: Tensor) -> Tensor:
        """Log-scores that decide, (B, C) float32, with gradient to ``x``."""
        scores = self._run(self._predict, x)
        if isinstance(scores, Tensor):  # what else a model may return is refused by check_scores
            self._evaluated.append((x.detach(), x._version, scores.detach()))
        return scores

    @property
    def views(self) -> Mapping[str, View]:
        """Differentiable readings of this model by name, ``"predict"`` among them; a plain module has that one."""
        views: dict[str, View] = {}
        if isinstance(self.module, EnsembleDefense):
            views = {name: self._wrap(view) for name, view in self.module.views().items()}
        return {**views, "predict": self}

    def member_logits(self, x: Tensor) -> Tensor | None:
        """(K, B, C), or None for a plain module."""
        return self._run(self.module.member_logits, x) if isinstance(self.module, EnsembleDefense) else None

    def selection(self, x: Tensor) -> Tensor | None:
        """(B, K) unnormalised log-weights of the members, or None if the defence does not choose among them."""
        if not isinstance(self.module, EnsembleDefense):
            return None
        return self._run(self.module.selection, x)

    def forget(self) -> None:
        """Drop the passes remembered for :meth:`scores_at`."""
        self._evaluated.clear()

    def scores_at(self, x: Tensor) -> Tensor | None:
        """The scores of a pass already made on exactly this tensor (the same memory, not written since)."""
        for seen, version, scores in reversed(self._evaluated):
            same = seen.data_ptr() == x.data_ptr() and version == x._version
            if same and seen.shape == x.shape and seen.stride() == x.stride():
                return scores
        return None

    def _predict(self, x: Tensor) -> Tensor:
        if self.combiner == "native" or not isinstance(self.module, EnsembleDefense):
            scores: Tensor = self.module(x)
            return scores
        return COMBINERS[self.combiner](self.module.member_logits(x))

    def _wrap(self, view: View) -> View:
        return lambda x: self._run(view, x)

    def _run(self, function: Callable[[Tensor], T], x: Tensor) -> T:
        if self.precision != "bf16":
            return function(x)
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            result = function(x)
        return cast(T, result.float()) if isinstance(result, Tensor) else result
