"""The attacked model as an attack sees it: a frozen copy that remembers what it was asked and counts the passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from ensdef.architecture import ResidualBlock
from ensdef.combine import COMBINERS
from ensdef.defense import EnsembleDefense
from ensdef.errors import UsageError
from ensdef.folding import FoldedCopy, frozen_copy
from ensdef.passes import Memory, PassCounter, watch

View = Callable[[Tensor], Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class Traits:
    """What an attack may know of a model before it begins.

    Args:
        num_classes: scores an image.
        image_shape: of one image.
        members: networks in the ensemble; 1 for a plain module.
        combiner: how they become one decision (``EnsembleDefense.combiner``, or the rule that replaces it); ``none``
            for a plain module.
        views: names of its readings, ``predict`` among them.
        differentiable: those that have a gradient with respect to the image.
        selects: whether ``selection`` gives weights of the members.
        random: whether two passes over the same images differ.
        residual_branches: shortcuts in all its networks whose branch gradient an attack may scale.
    """

    num_classes: int
    image_shape: tuple[int, ...]
    members: int
    combiner: str
    views: tuple[str, ...]
    differentiable: tuple[str, ...]
    selects: bool
    random: bool
    residual_branches: int = 0


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
        self.memory = Memory()
        #: is shown every pass that keeps a graph to the image, while an observer looks on
        self.witness: Callable[[Tensor, Tensor], None] | None = None
        members = self.module.members if isinstance(self.module, EnsembleDefense) else [self.module]
        for member in members:
            watch(member, self.passes, self.memory)

    def __call__(self, x: Tensor) -> Tensor:
        """Log-scores that decide, (B, C) float32, with gradient to ``x``."""
        scores = self._run(self._predict, x)
        if isinstance(scores, Tensor):  # what else a model may return is refused by check_scores
            self.memory.keep("predict", x, scores.detach())
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

    @property
    def residual_blocks(self) -> list[ResidualBlock]:
        """The blocks of this copy, of all members, whose branch gradient an attack may scale (SGM)."""
        return [part for part in self.module.modules() if isinstance(part, ResidualBlock)]

    def forget(self) -> None:
        """Drop the passes remembered so far."""
        self.memory.forget()

    def scores_at(self, x: Tensor) -> Tensor | None:
        """The scores of a pass already made on exactly this tensor (the same memory, not written since)."""
        scores: Tensor | None = self.memory.find("predict", x)
        return scores

    def sharing(self) -> AbstractContextManager[None]:
        """Readings of one point inside share their member passes, gradients too: one backward pass through them all."""
        return self.memory.sharing()

    def traits(self, x: Tensor) -> Traits:
        """Look at the model through a few images (B, ...); nothing is counted or remembered."""
        before, remembered, self.memory.on = self.passes.forwards, self.memory.on, False
        views = self.views
        point = x.detach().requires_grad_()
        with torch.enable_grad():
            scores = {name: view(point) for name, view in views.items()}
        module = self.module if isinstance(self.module, EnsembleDefense) else None
        kinds = {"native": module.combiner if module else "none", "avg": "mean"}
        traits = Traits(
            num_classes=scores["predict"].shape[1],
            image_shape=tuple(x.shape[1:]),
            members=len(module.members) if module else 1,
            combiner=kinds.get(self.combiner, self.combiner),
            views=tuple(views),
            differentiable=tuple(name for name, value in scores.items() if value.requires_grad),
            selects=self.combiner == "native" and self.selection(x) is not None,
            random=not torch.allclose(self(x), scores["predict"], rtol=1e-4, atol=1e-4),
            residual_branches=len(self.residual_blocks),
        )
        self.passes.forwards, self.memory.on = before, remembered
        return traits

    def _predict(self, x: Tensor) -> Tensor:
        if self.combiner == "native" or not isinstance(self.module, EnsembleDefense):
            scores: Tensor = self.module(x)
            return scores
        return COMBINERS[self.combiner](self.module.member_logits(x))

    def _wrap(self, view: View) -> View:
        return lambda x: self._run(view, x)

    def _run(self, function: Callable[[Tensor], T], x: Tensor) -> T:
        result = self._compute(function, x)
        if self.witness is not None and isinstance(result, Tensor) and result.requires_grad and x.requires_grad:
            self.witness(x, result)
        return result

    def _laid_out(self, x: Tensor) -> Tensor:
        """``x`` in the faster layout, that of the convolutions; attacks that put batches together lose it."""
        if x.dim() != 4 or x.is_contiguous(memory_format=self.memory_format):
            return x
        known = None if x.requires_grad else self.memory.find("layout", x)
        if known is None:
            known = x.contiguous(memory_format=self.memory_format)
            if not x.requires_grad:
                self.memory.keep("layout", x, known)
        laid_out: Tensor = known
        return laid_out

    def _compute(self, function: Callable[[Tensor], T], x: Tensor) -> T:
        x = self._laid_out(x)
        if self.precision != "bf16":
            return function(x)
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            result = function(x)
        return cast(T, result.float()) if isinstance(result, Tensor) else result
