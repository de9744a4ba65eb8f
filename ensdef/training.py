"""One loop that trains every defence: a specification and data in, weights and a report out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from ensdef import training_health, training_state
from ensdef.build import build_defense
from ensdef.data import Data
from ensdef.defense import EnsembleDefense
from ensdef.footnotes import flag_note
from ensdef.journal import Journal
from ensdef.launch import launch
from ensdef.parallel import Share, check_devices, check_training, share_batch_norm
from ensdef.peak import begin_peak, peak
from ensdef.progress import Progress
from ensdef.registry import METHODS
from ensdef.rng import derived_generator
from ensdef.specs import ModelSpec, TrainSpec
from ensdef.training_loop import HOLDOUT, TrainingLoop, weights_of

__all__ = ["HOLDOUT", "Trained", "train"]


@dataclass
class Trained:
    """What training gives: the defence in eval mode on the CPU, and what happened."""

    defense: EnsembleDefense
    report: dict[str, Any]


def train(
    spec: TrainSpec,
    data: Data,
    prerequisites: Mapping[str, EnsembleDefense] | None = None,
    *,
    device: str = "auto",
    devices: int = 1,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train a defence from scratch (or from its prerequisites).

    Several devices share every batch (``ensdef.parallel``). Without batch norm they give the weights that one gives,
    to rounding, if all randomness is the trainer's: order, augmentation, radius, random starts of attacks on the whole
    batch. What a loss draws from ``batch.rng``, attacks on a part of the batch, and dropout have draws of each
    process's own. With batch norm, processes on the CPU keep their own statistics, of which the first one's are saved,
    and GPUs synchronise them.

    Args:
        spec: method, architecture, recipe, inner attack, seed.
        data: the data set the specification names, loaded and limited.
        prerequisites: trained defences by role, as ``spec.prerequisites`` names them.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        devices: GPUs, or processes on the CPU.
        journal: keeps the training's state after its epochs, and may have that of an earlier process, which is taken
            up. A training that several devices share keeps none: it starts over.
        progress: told after every batch; with several devices a copy of it is, in the first process.
    Raises:
        UsageError: several devices where there are fewer, or where they cannot share this training.
        TrainingDiverged: a loss term is NaN or infinite; carries the weights of the last good epoch.
    """
    progress = progress or Progress()
    began = time.monotonic()
    precision: Any = "bf16-mixed" if spec.setting.precision == "bf16" else "32-true"
    earlier = 0.0
    if devices == 1:
        fabric = Fabric(accelerator=device, devices=1, precision=precision)
        loop, report = _train(fabric, Share(), spec, data, prerequisites or {}, progress, journal)
        defense, earlier = loop.defense, loop.earlier
    else:
        check_devices(devices, device)
        check_training(spec, devices)
        if journal is not None:
            progress.message(f"{_title(spec)}: on {devices} devices it is not kept; if it is stopped, it starts over")
        needed = {role: (one.spec, one.state_dict()) for role, one in (prerequisites or {}).items()}
        weights, report = launch(
            _train_share, (spec, data, needed, progress), devices=devices, device=device, precision=precision
        )
        defense = build_defense(spec.model, spec.setting.seed)
        defense.load_state_dict(weights)
    for finding in report["health"]:
        progress.message(f"{spec.model.method_call} seed {spec.setting.seed}: {flag_note(finding)}")
    return Trained(defense, {"seconds": earlier + time.monotonic() - began, **report})


def _title(spec: TrainSpec) -> str:
    return f"train {spec.model.method_call} seed {spec.setting.seed}"


def _train_share(
    fabric: Fabric,
    share: Share,
    spec: TrainSpec,
    data: Data,
    needed: Mapping[str, tuple[ModelSpec, Mapping[str, Tensor]]],
    progress: Progress,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The work of one process: prerequisites come, and the trained defence goes, as a specification and weights."""
    prerequisites = {}
    for role, (model, weights) in needed.items():
        prerequisites[role] = build_defense(model)
        prerequisites[role].load_state_dict(dict(weights))
    loop, report = _train(fabric, share, spec, data, prerequisites, progress if share.rank == 0 else Progress())
    return weights_of(loop.defense), report


def _train(
    fabric: Fabric,
    share: Share,
    spec: TrainSpec,
    data: Data,
    prerequisites: Mapping[str, EnsembleDefense],
    progress: Progress,
    journal: Journal | None = None,
) -> tuple[TrainingLoop, dict[str, Any]]:
    """The finished loop, its defence in eval mode on the CPU, and the report; of several, the first process counts."""
    begin_peak(fabric.device.type)
    with torch.random.fork_rng(enabled=share.alone):
        torch.manual_seed(spec.setting.seed)  # for dropout, which draws from the global state
        defense = build_defense(spec.model, spec.setting.seed)
        defense.warm_start(prerequisites)
        if not share.alone:
            share.start_alike(defense)
            torch.manual_seed(derived_generator(torch.device("cpu"), spec.setting.seed, share.rank, -6).initial_seed())
        batch_norm = share_batch_norm(defense, share, fabric.device)
        defense.to(device=fabric.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        loop = TrainingLoop.prepare(spec, defense, data, fabric, share)
        _run(loop, journal, progress)
        if loop.best is not None:
            defense.load_state_dict(loop.best[1])
        memory = max(peak(fabric.device.type), loop.peak_before)
        health = _examine(loop) if share.rank == 0 else []
    defense.lend(None)
    defense.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    defense.eval()
    return loop, {
        "history": loop.history,
        "kept": "best epoch by robust accuracy on held-out training images" if loop.best else "last epoch",
        "images_seen": loop.recipe.epochs * min(len(loop.train), loop.steps_per_epoch * loop.recipe.batch_size),
        "device": str(fabric.device),
        "devices": share.count,
        "peak_memory_mb": round(memory / 2**20, 1) or None,
        **({"batch_norm": batch_norm} if batch_norm else {}),
        "health": health,
    }


def _run(loop: TrainingLoop, journal: Journal | None, progress: Progress) -> None:
    """All epochs, or those that an earlier process left."""
    title, epochs = _title(loop.spec), loop.recipe.epochs
    if journal is not None and (kept := journal.read()) is not None:
        with journal.taking_up():
            training_state.restore(loop, kept)
        progress.message(f"{title}: goes on after {loop.epoch} of {epochs} epochs")
    with progress.task(title, epochs * loop.steps_per_epoch) as advance:
        if loop.epoch:
            advance(loop.epoch * loop.steps_per_epoch)
        while loop.epoch < epochs:
            loop.run_epoch(advance)
            if journal is not None:
                journal.keep(lambda: training_state.snapshot(loop))


def _examine(loop: TrainingLoop) -> list[training_health.Finding]:
    """What can be said of the finished training; draws from generators of its own."""
    spec, device = loop.spec, loop.fabric.device
    order = torch.randperm(len(loop.train), generator=derived_generator(torch.device("cpu"), spec.setting.seed, -4))
    sample = order[: training_health.CLEAN_SAMPLE].to(device)
    attacked = METHODS.get(spec.method).trains_on_attacks(spec.hyper)
    try:
        return training_health.examine(
            loop.defense.eval(),
            loop.train.x(sample),
            loop.train.labels[sample],
            loop.history,
            loop.recipe.attack if attacked else None,
            loop.adversary.norm,
            loop.adversary.eps[1],
            derived_generator(device, spec.setting.seed, -5),
            loop.recipe.batch_size,
        )
    except Exception as error:  # a look afterwards must not cost the training
        return [training_health.unexamined(error)]
