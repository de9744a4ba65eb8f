"""New processes for a training, one a device: how they are started, find each other, and tell what came of it."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from torch.multiprocessing.spawn import ProcessException, start_processes

from ensdef.errors import TrainingDiverged
from ensdef.parallel import Share
from ensdef.records import write_bytes
from ensdef.registry import load_plugin, loaded_plugins
from ensdef.signals import end_at_once

#: How long processes wait for one: the first alone looks at held-out images. One that died is noticed at once.
PATIENCE = timedelta(hours=2)
#: What the work of :func:`launch` raises in all processes alike, so that none of them waits for another.
_RAISED_BY_ALL = TrainingDiverged


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
    end_at_once()  # the process that started this one tells what there is to tell
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
