"""What one training batch of a defence costs, counted in passes of one member network over the batch.

A pass is one forward call of a :class:`ensdef.architecture.Network` anywhere in the defence (members, gates) and one
backward through it, if there is any; a second backward through the same call counts as a second pass. Calls of a
network's parts (``trunk``, ``classifier``) are not seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ensdef.architecture import Network
from ensdef.build import build_defense
from ensdef.defense import Batch
from ensdef.notation import parse_call
from ensdef.registry import METHODS
from ensdef.specs import ModelSpec
from ensdef.testing import lend_adversary
from ensdef.training_loop import freeze_the_rest, training_mode

ARCHITECTURE, SHAPE, CLASSES = "small_resnet[width=4]", (1, 8, 8), 10


@dataclass(frozen=True)
class Passes:
    """Member passes by kind; a pass over half the batch counts 0.5.

    Args:
        forward: no gradient was taken.
        input_gradient: a backward to the image alone (an attack step).
        training: a backward to parameters.
        double_backward: a backward to the image whose result was differentiated, with the backward that did so.
    """

    forward: float = 0.0
    input_gradient: float = 0.0
    training: float = 0.0
    double_backward: float = 0.0

    @property
    def total(self) -> float:
        """The same work in training passes (one forward and one backward of one member).

        By the multiplications of a convolution: the forward has one product, the gradient at its input one more, that
        at its weights a third; differentiating the input gradient again repeats the first three and makes three new.
        """
        return (self.forward + 2 * self.input_gradient + 3 * self.training + 6 * self.double_backward) / 3


_KINDS = tuple(Passes.__dataclass_fields__)


def count_passes(method_call: str, members: int = 3, steps: int = 10, batch: int = 8) -> Passes:
    """Count one batch of an untrained defence on tiny networks; all optimiser steps of the batch together.

    Args:
        method_call: method with hyper-parameters, such as ``"adp[adversarial=none]"``.
        members: for methods that do not fix their number.
        steps: of the inner attack, where the method does not set them itself.
        batch: number of images.
    Raises:
        UsageError: unknown method or hyper-parameter, or a combination that the method refuses.
    """
    name, hyper = parse_call(method_call)
    defense = build_defense(ModelSpec.create(name, hyper, ARCHITECTURE, members, CLASSES, SHAPE, (0.5,), (0.25,)))
    freeze_the_rest(defense)
    training_mode(defense)
    lend_adversary(defense, attack=dataclasses.replace(METHODS.get(name).recipe.attack, steps=steps))
    made: list[_Call] = []
    for module in defense.modules():
        if isinstance(module, Network):
            _watch(module, made, batch)
    rng = torch.Generator().manual_seed(0)
    (x, y), *streams = [
        (torch.rand(batch, *SHAPE, generator=rng), torch.arange(batch) % CLASSES) for _ in range(defense.streams)
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        defense.begin_epoch(0, rng)
        result = defense.loss(Batch(x, y, torch.arange(batch), tuple(streams), rng), 0.5)
        for terms in [result] if isinstance(result, dict) else result:
            torch.stack(list(terms.values())).sum().backward()
    return Passes(**{kind: sum((one.count(kind) * one.share for one in made), 0.0) for kind in _KINDS})


def multiplications(network: nn.Module, image_shape: tuple[int, ...]) -> int:
    """Of one forward pass over one image: convolutions and linear layers, as torch counts them.

    Args:
        network: images to scores; a member, or a whole defence.
        image_shape: of one image, (channels, height, width).
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, *image_shape, device=next(network.parameters()).device))
    # one multiplication and one addition each
    return int(counter.get_total_flops()) // 2


@dataclass
class _Call:
    """One forward call over ``share`` of the batch; the rest are numbers of the backward runs that went through it.

    Args:
        to_image, to_parameters: runs that gave the image, or any parameter, a gradient.
        differentiated: runs whose gradient at the image was differentiated in a later run.
        differentiating: those later runs.
    """

    share: float
    to_image: set[int] = field(default_factory=set)
    to_parameters: set[int] = field(default_factory=set)
    differentiated: set[int] = field(default_factory=set)
    differentiating: set[int] = field(default_factory=set)

    def count(self, kind: str) -> int:
        """Passes of this kind."""
        plain = (self.to_image | self.to_parameters) - self.differentiated - self.differentiating
        return {
            "forward": int(not self.to_image and not self.to_parameters),
            "input_gradient": len(plain - self.to_parameters),
            "training": len(plain & self.to_parameters),
            "double_backward": len(self.differentiated),
        }[kind]


def _watch(network: nn.Module, made: list[_Call], batch: int) -> None:
    """Note every call of ``network``, and of copies made of it from now on (a hook is copied by reference)."""

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # a tensor of its own for every call: members may share one image and differ in what is done with them
        x = args[0] if args else kwargs.pop("x")
        return (x.view_as(x), *args[1:]), kwargs

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        x = args[0]
        call = _Call(len(x) / batch)
        made.append(call)

        def reached_image(gradient: Tensor) -> None:
            run = _backward_run()
            call.to_image.add(run)

            def differentiate(_: Tensor) -> None:
                call.differentiated.add(run)
                call.differentiating.add(_backward_run())

            if gradient.requires_grad:
                gradient.register_hook(differentiate)

        def reached_node(gradients: tuple[Tensor | None, ...], at: list[int]) -> None:
            if any(gradients[index] is not None for index in at):
                call.to_parameters.add(_backward_run())

        if x.requires_grad:
            x.register_hook(reached_image)
        outputs = output if isinstance(output, tuple) else (output,)
        for node, at in _parameter_edges(outputs, x.grad_fn):
            node.register_hook(lambda gradients, _, at=at: reached_node(gradients, at))

    network.register_forward_pre_hook(enter, with_kwargs=True)
    network.register_forward_hook(leave)


def _backward_run() -> int:
    """A number that all hooks of one ``backward`` or ``grad`` call share; what torch's own multi-tensor hooks use."""
    return torch._C._current_graph_task_id()


def _parameter_edges(outputs: tuple[Tensor, ...], image: Any) -> Iterator[tuple[Any, list[int]]]:
    """Nodes of a call's graph that hand gradients to parameters, and which of their gradients those are."""
    seen = {None, image}
    waiting = [output.grad_fn for output in outputs]
    while waiting:
        node: Any = waiting.pop()
        if node not in seen:
            seen.add(node)
            children = [child for child, _ in node.next_functions]
            # only leaves have a variable, and the image is none here
            if at := [index for index, child in enumerate(children) if hasattr(child, "variable")]:
                yield node, at
            waiting += children
