"""Training on several devices of one machine: a process a device, and the little that they tell each other.

Every process builds the same defence, draws the same whole batch and computes the loss of its own rows, weighted so
that the sum over processes is the loss of the batch. Gradients are added up, so all take the same optimiser steps.
"""

from __future__ import annotations

import logging
import os
import pickle
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import nn
from torch.multiprocessing.spawn import ProcessException, start_processes

from ensdef.build import build_defense
from ensdef.defense import Terms
from ensdef.errors import PluginError, TrainingDiverged, UsageError
from ensdef.records import write_bytes
from ensdef.registry import load_plugin, loaded_plugins
from ensdef.specs import TrainSpec

#: Images of a batch that a process has at least: batch norm cannot train on one.
SMALLEST_SHARE = 2
#: How long processes wait for one: the first alone looks at held-out images. One that died is noticed at once.
PATIENCE = timedelta(hours=2)
#: What the work of :func:`launch` raises in all processes alike, so that none of them waits for another.
_RAISED_BY_ALL = TrainingDiverged


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


def launch(work: Callable[..., Any], arguments: tuple[Any, ...], *, devices: int, device: str, precision: Any) -> Any:
    """Call ``work(fabric, share, *arguments)`` in a new process for every device; gives what the first returns.

    Plug-ins loaded here are loaded there. A process that fails ends the others.

    Args:
        work: a function of a module; it and its arguments are pickled.
        device, precision: as Fabric takes them.
    Raises:
        Exception: what ``work`` raised.
    """
    with TemporaryDirectory(prefix="ensdef-") as name:
        folder = Path(name)
        torch.save((work, arguments), folder / "job")
        # a thread more than there are cores makes every operator wait for the slowest
        threads = max(1, torch.get_num_threads() // devices)
        handed = (devices, folder, device, precision, threads, loaded_plugins())
        context: Any = start_processes(_process, handed, nprocs=devices, join=False, start_method="spawn")
        try:
            while not context.join():
                pass
        except ProcessException as error:
            # others may have failed because the first to fail left them
            failures = sorted(folder.glob("failure-*"), key=lambda path: path.stat().st_mtime_ns)
            if failures:
                raise pickle.loads(failures[0].read_bytes()) from error
            raise RuntimeError(f"a training process ended without a word ({error}); it may lack memory") from error
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.terminate()
                process.join()
        outcome = torch.load(folder / "outcome", weights_only=False)
    if isinstance(outcome, _RAISED_BY_ALL):
        raise outcome
    return outcome


def _process(
    rank: int, count: int, folder: Path, device: str, precision: Any, threads: int, plugins: Sequence[str]
) -> None:
    os.dup2(2, 1)  # standard output is the parent's, for records; libraries that greet there go where messages go
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    try:
        for plugin in plugins:
            load_plugin(plugin)
        work, arguments = torch.load(folder / "job", weights_only=False, mmap=True)
        fabric = _meet_the_others(rank, count, folder, device, precision)
        if fabric.device.type == "cpu":
            torch.set_num_threads(threads)
        try:
            outcome = work(fabric, Share(rank, count), *arguments)
        except _RAISED_BY_ALL as error:
            outcome = error
        if rank == 0:
            torch.save(outcome, folder / "outcome")
        dist.destroy_process_group()
    except Exception as error:
        write_bytes(folder / f"failure-{rank}", _pickled(error))
        raise


def _meet_the_others(rank: int, count: int, folder: Path, device: str, precision: Any) -> Fabric:
    # Fabric then joins the group that is there; a file to meet in, unlike a port, cannot be taken by somebody else
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0")
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    fabric = Fabric(
        accelerator="cuda" if cuda else "cpu",
        devices=count,
        strategy=DDPStrategy(),
        plugins=[LightningEnvironment()],  # not what a cluster's variables suggest: all processes are on this machine
        precision=precision,
    )
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        init_method=(folder / "meeting").as_uri(),
        rank=rank,
        world_size=count,
        timeout=PATIENCE,
    )
    fabric.launch()
    return fabric


def _pickled(error: Exception) -> bytes:
    try:
        content = pickle.dumps(error)
        pickle.loads(content)
    except Exception:  # an exception of other people's making may do anything
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return content
