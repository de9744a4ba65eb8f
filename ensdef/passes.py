"""Member passes of an attacked model: counted, and remembered so that two readings of one point cost one pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook


@dataclass
class PassCounter:
    """Member passes, counted in images: one forward of 3 members on 10 images is 30.

    ``share`` is the part of the rows that counts; the rest is padding.
    """

    forwards: int = 0
    backwards: int = 0
    share: float = 1.0

    def count(self, x: Tensor, outputs: tuple[Any, ...]) -> None:
        """One forward on ``x`` that gave ``outputs``, and later every backward through it."""
        size = round(len(x) * self.share)
        self.forwards += size
        tensors = [part for part in outputs if isinstance(part, Tensor) and part.requires_grad]

        def count_backward(gradient: Tensor) -> None:
            self.backwards += size

        if tensors:  # once a backward pass, through however many of the outputs it comes
            register_multi_grad_hook(tensors, count_backward, mode="any")


class Memory:
    """Answers already given, by the memory of the tensor that was asked about.

    Off (``on = False``) for attacks with a loop of their own: nobody would tell it when to forget.
    """

    def __init__(self) -> None:
        self.on = True
        self.graphs = False
        self._kept: list[tuple[Any, Tensor, int, Any]] = []

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Hand out graphs too. Whoever asks promises a single backward pass through all that was read inside."""
        self.graphs = True
        try:
            yield
        finally:
            self.graphs = False

    def keep(self, what: Any, x: Tensor, answer: Any) -> None:
        """Remember the answer to the question ``what`` about ``x``."""
        if self.on:
            self._kept.append((what, x, x._version, answer))

    def find(self, what: Any, x: Tensor) -> Any:
        """The latest answer about exactly this tensor (the same memory, not written since), or None."""
        for asked, seen, version, answer in reversed(self._kept):
            same = asked == what and seen.data_ptr() == x.data_ptr() and version == x._version
            if same and seen.shape == x.shape and seen.stride() == x.stride():
                return answer
        return None

    def forget(self) -> None:
        """Drop everything."""
        self._kept.clear()


@dataclass(frozen=True)
class _Pass:
    """What a member answered; of no use once somebody wrote into it."""

    x: Tensor
    output: Any
    versions: tuple[int, ...]

    @property
    def intact(self) -> bool:
        return self.versions == tuple(part._version for part in parts_of(self.output))

    def without_graph(self) -> Any:
        if isinstance(self.output, Tensor):
            return self.output.detach()
        return tuple(part.detach() for part in self.output)


def parts_of(output: Any) -> tuple[Any, ...]:
    return output if isinstance(output, tuple) else (output,)


def watch(member: nn.Module, passes: PassCounter, memory: Memory) -> None:
    """Count every pass through a member from now on; a pass already made answers a later one that needs no gradient.

    Graphs are handed out a second time only inside ``memory.sharing()``: elsewhere the first reader may have freed
    them.
    """
    run = member.forward

    def forward(*inputs: Any, **options: Any) -> Any:
        x = inputs[0]
        question = (id(member), len(inputs), *sorted(options.items()))
        known = memory.find(question, x) if len(inputs) == 1 else None
        if known is not None and known.intact:
            if not (torch.is_grad_enabled() and x.requires_grad):
                return known.without_graph()
            if memory.graphs and known.x is x and any(part.requires_grad for part in parts_of(known.output)):
                return known.output
        output = run(*inputs, **options)
        passes.count(x, parts_of(output))
        if len(inputs) == 1 and all(isinstance(part, Tensor) for part in parts_of(output)):
            memory.keep(question, x, _Pass(x, output, tuple(part._version for part in parts_of(output))))
        return output

    member.forward = forward
