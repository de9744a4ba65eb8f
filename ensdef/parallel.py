"""Training on several devices of one machine: a process a device, and the little that they tell each other.

Every process builds the same defence, draws the same whole batch and computes the loss of its own rows, weighted so
that the sum over processes is the loss of the batch. Gradients are added up, so all take the same optimiser steps.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from ensdef.build import build_defense
from ensdef.defense import Terms
from ensdef.errors import PluginError, UsageError
from ensdef.specs import TrainSpec

#: Images of a batch that a process has at least: batch norm cannot train on one.
SMALLEST_SHARE = 2


@dataclass(frozen=True)
class Share:
    """What one process has of a training; alone, it has the whole, and nothing is exchanged.

    Args:
        rank: which process it is, from 0.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def alone(self) -> bool:
        return self.count == 1

    def rows(self, total: int) -> slice:
        """Its images of a batch of ``total``; a last batch that is too small is computed whole by every process."""
        if total < SMALLEST_SHARE * self.count:
            return slice(0, total)
        return slice(self.rank * total // self.count, (self.rank + 1) * total // self.count)

    def weight(self, total: int) -> float:
        """Of its mean over :meth:`rows`, so that the weighted sum over processes is the mean over the batch."""
        if total < SMALLEST_SHARE * self.count:
            return 1 / self.count
        rows = self.rows(total)
        return float(rows.stop - rows.start) / total

    def start_alike(self, module: nn.Module) -> None:
        """Take over the first process's weights and buffers; on the CPU, before training."""
        if not self.alone:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)

    def meet(self, where: str) -> None:
        """Wait for the others and make sure that they came to the same point: nobody may wait for what never comes.

        Raises:
            PluginError: in every process, when they came to different points.
        """
        if self.alone:
            return
        mark = zlib.crc32(where.encode())
        largest = torch.tensor([mark, -mark])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        if int(largest[0]) != -int(largest[1]):
            raise PluginError(
                f"process {self.rank} came to {where}, another to something else: with several devices the number of "
                "dicts that loss yields, and their names, must be the same for all images and for all draws from "
                "batch.rng; train with --devices 1"
            )

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.alone:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags)

    @torch.no_grad()
    def add_up(self, parameters: Sequence[nn.Parameter], terms: Terms, weight: float, where: str) -> Terms:
        """Replace gradients, whose loss was weighted already, by their sum over processes; returns the summed terms.

        A parameter without gradient in every process stays without one.

        Args:
            parameters: in the same order in every process.
            terms: scalars to be weighted here.
            where: the point of the training, as in :meth:`meet`.
        """
        if self.alone:
            return terms
        names = sorted(terms)
        self.meet(f"{where}, terms {', '.join(names)}")
        device = parameters[0].device
        gradients = [parameter.grad for parameter in parameters]
        parts = [
            torch.zeros(parameter.numel(), dtype=parameter.dtype, device=device) if gradient is None else gradient
            for parameter, gradient in zip(parameters, gradients, strict=True)
        ]
        # on the CPU, as what is agreed on in meet: reading it from a GPU would stall that
        present = torch.tensor([int(gradient is not None) for gradient in gradients])
        dist.all_reduce(present, op=dist.ReduceOp.MAX)
        values = torch.stack([terms[name].detach().float() for name in names]).to(device) * weight
        flat = torch.cat([part.flatten() for part in [*parts, values]])
        dist.all_reduce(flat)
        *parts, values = flat.split([parameter.numel() for parameter in parameters] + [len(names)])
        for parameter, part, given in zip(parameters, parts, present.tolist(), strict=True):
            if given:
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                parameter.grad.copy_(part.view_as(parameter))
        return dict(zip(names, values.unbind(), strict=True))


def share_batch_norm(module: nn.Module, share: Share, device: torch.device) -> str | None:
    """Make batch norms take the statistics of the whole batch where PyTorch can (CUDA); says what they take.

    Parameters, buffers and their names stay, so the state dict still fits the module as it was.

    Returns:
        ``"synchronised"``, ``"per process"``, or None: nothing is shared, or there is no batch norm.
    """
    if share.alone or not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules()):
        return None
    if device.type != "cuda":
        return "per process"
    nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return "synchronised"


def check_devices(devices: int, device: str) -> None:
    """Refuse a number of devices that this machine does not have.

    Args:
        device: ``"auto"``, ``"cpu"`` (a device is a process) or ``"cuda"``.
    Raises:
        UsageError: fewer than one, or more GPUs than there are.
    """
    if devices < 1:
        raise UsageError(f"devices is {devices}; expected at least 1")
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        there = torch.cuda.device_count()
        if devices > there:
            raise UsageError(
                f"devices is {devices}, but PyTorch sees {there} CUDA device{'s' * (there != 1)}; ask for {there} at "
                "most, or for processes on the CPU with --device cpu"
            )


def check_training(spec: TrainSpec, devices: int) -> None:
    """Refuse a training that several devices cannot share.

    Raises:
        UsageError: its batches do not split evenly, or its loss is no mean over examples.
    """
    if devices == 1:
        return
    size = spec.recipe.batch_size
    fitting = [number for number in range(1, size // SMALLEST_SHARE + 1) if size % number == 0] or [1]
    if devices not in fitting:
        raise UsageError(
            f"devices is {devices}, but {spec.model.method_call} trains with a batch_size of {size}, of which every "
            f"device must get the same number of images, {SMALLEST_SHARE} at least; "
            f"devices that work: {', '.join(map(str, fitting))}"
        )
    if build_defense(spec.model).batch_coupled:
        raise UsageError(
            f"devices is {devices}, but the loss of {spec.model.method_call} couples the images of a batch "
            "(batch_coupled), so splitting a batch would change it; train it with --devices 1 first: once it is "
            "trained, the number of devices does not matter"
        )
