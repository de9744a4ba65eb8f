"""One loop that trains every defence: a specification and data in, weights and a report out."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from ensdef import augment, training_health
from ensdef.adversary import Adversary, Part
from ensdef.backend import safe_convolutions
from ensdef.build import build_defense
from ensdef.checkpoints import packed
from ensdef.data import Data, Split
from ensdef.defense import Batch, EnsembleDefense, Terms
from ensdef.errors import PluginError, TrainingDiverged
from ensdef.footnotes import flag_note
from ensdef.launch import launch
from ensdef.losses import cross_entropy
from ensdef.parallel import Share, check_devices, check_training, share_batch_norm
from ensdef.peak import begin_peak, peak
from ensdef.progress import Progress
from ensdef.recipe import Recipe, parse_train_eps
from ensdef.registry import METHODS
from ensdef.rng import derived_generator
from ensdef.specs import ModelSpec, TrainSpec
from ensdef.threat import Threat

#: Share of the training images held out where the recipe keeps the best epoch.
HOLDOUT = 0.1


@dataclass
class Trained:
    """What training gives: the defence in eval mode on the CPU, and what happened."""

    defense: EnsembleDefense
    report: dict[str, Any]


@dataclass
class _Loop:
    """The state of one training that its helpers share."""

    spec: TrainSpec
    defense: EnsembleDefense
    adversary: Adversary
    fabric: Fabric
    optimizer: Any
    train: Split
    steps_per_epoch: int
    share: Share
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def recipe(self) -> Recipe:
        return self.spec.recipe


def train(
    spec: TrainSpec,
    data: Data,
    prerequisites: Mapping[str, EnsembleDefense] | None = None,
    *,
    device: str = "auto",
    devices: int = 1,
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
        progress: told after every batch; with several devices a copy of it is, in the first process.
    Raises:
        UsageError: several devices where there are fewer, or where they cannot share this training.
        TrainingDiverged: a loss term is NaN or infinite; carries the weights of the last good epoch.
    """
    progress = progress or Progress()
    began = time.monotonic()
    precision: Any = "bf16-mixed" if spec.setting.precision == "bf16" else "32-true"
    if devices == 1:
        fabric = Fabric(accelerator=device, devices=1, precision=precision)
        defense, report = _train(fabric, Share(), spec, data, prerequisites or {}, progress)
    else:
        check_devices(devices, device)
        check_training(spec, devices)
        needed = {role: (one.spec, one.state_dict()) for role, one in (prerequisites or {}).items()}
        weights, report = launch(
            _train_share, (spec, data, needed, progress), devices=devices, device=device, precision=precision
        )
        defense = build_defense(spec.model, spec.setting.seed)
        defense.load_state_dict(weights)
    for finding in report["health"]:
        progress.message(f"{spec.model.method_call} seed {spec.setting.seed}: {flag_note(finding)}")
    return Trained(defense, {"seconds": time.monotonic() - began, **report})


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
    defense, report = _train(fabric, share, spec, data, prerequisites, progress if share.rank == 0 else Progress())
    return _snapshot(defense), report


def _train(
    fabric: Fabric,
    share: Share,
    spec: TrainSpec,
    data: Data,
    prerequisites: Mapping[str, EnsembleDefense],
    progress: Progress,
) -> tuple[EnsembleDefense, dict[str, Any]]:
    """The trained defence, in eval mode on the CPU, and the report; of several processes, the first one's counts."""
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
        loop, holdout = _prepare(spec, defense, data, fabric, share)
        best: tuple[float, dict[str, Tensor]] | None = None
        last_good = _snapshot(defense)
        with progress.task(
            f"train {spec.model.method_call} seed {spec.setting.seed}", loop.recipe.epochs * loop.steps_per_epoch
        ) as advance:
            for epoch in range(loop.recipe.epochs):
                defense.begin_epoch(epoch, derived_generator(torch.device("cpu"), spec.setting.seed, epoch, -1))
                try:
                    with safe_convolutions(defense, fabric.device):
                        terms = _train_epoch(loop, epoch, advance)
                    _check_weights(loop, epoch)
                except TrainingDiverged as error:
                    raise TrainingDiverged(str(error), packed(last_good)) from error
                if loop.recipe.keep == "best" and share.rank == 0:
                    score = _robust_accuracy(loop, holdout)
                    terms["holdout_robust_accuracy"] = score
                    if best is None or score > best[0]:
                        best = (score, _snapshot(defense))
                loop.history.append(terms)
                last_good = _snapshot(defense)
        if best is not None:
            defense.load_state_dict(best[1])
        memory = peak(fabric.device.type)
        health = _examine(loop) if share.rank == 0 else []
    defense.lend(None)
    defense.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return defense.eval(), {
        "history": loop.history,
        "kept": "best epoch by robust accuracy on held-out training images" if best else "last epoch",
        "images_seen": loop.recipe.epochs * min(len(loop.train), loop.steps_per_epoch * loop.recipe.batch_size),
        "device": str(fabric.device),
        "devices": share.count,
        "peak_memory_mb": round(memory / 2**20, 1) or None,
        **({"batch_norm": batch_norm} if batch_norm else {}),
        "health": health,
    }


def _prepare(
    spec: TrainSpec, defense: EnsembleDefense, data: Data, fabric: Fabric, share: Share
) -> tuple[_Loop, Split]:
    recipe = spec.recipe
    images = data.train
    held = round(HOLDOUT * len(images)) if recipe.keep == "best" else 0
    order = torch.randperm(len(images), generator=derived_generator(torch.device("cpu"), spec.setting.seed, -2))
    holdout, train = images.select(order[:held]), images.select(order[held:].sort().values)
    train, holdout = train.to(fabric.device), holdout.to(fabric.device)
    low, high = parse_train_eps(spec.setting.train_eps, spec.setting.norm)
    adversary = Adversary(defense, recipe.attack, spec.setting.norm, (float(low), float(high)))
    defense.lend(adversary)
    moved = freeze_the_rest(defense)
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "adam":
        optimizer = torch.optim.Adam(moved, lr=recipe.lr, weight_decay=recipe.weight_decay, eps=1e-7)
    else:
        optimizer = torch.optim.SGD(moved, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    steps = max(1, -(-len(train) // recipe.batch_size) - (len(train) % recipe.batch_size == 1))
    return _Loop(spec, defense, adversary, fabric, fabric.setup_optimizers(optimizer), train, steps, share), holdout


def _train_epoch(loop: _Loop, epoch: int, advance: Any) -> dict[str, float]:
    """One pass over the data; returns the mean of every term."""
    defense, recipe, device = loop.defense, loop.recipe, loop.fabric.device
    training_mode(defense)
    augmentations = augment.parse(str(recipe.augment))
    orders = [
        torch.randperm(
            len(loop.train), generator=derived_generator(torch.device("cpu"), loop.spec.setting.seed, epoch, stream)
        ).to(device)
        for stream in range(defense.streams)
    ]
    logged: list[tuple[int, Terms]] = []
    for index in range(loop.steps_per_epoch):
        rng = derived_generator(device, loop.spec.setting.seed, epoch, index, 1)
        ids = [order[index * recipe.batch_size : (index + 1) * recipe.batch_size] for order in orders]
        total = len(ids[0])
        rows = loop.share.rows(total)
        own = _begin_batch(loop, rng, rows, total, (epoch, index))
        drawn = []
        for positions in ids:
            x = loop.train.x(positions)
            for change in augmentations:  # of the whole batch, so that all processes go on drawing the same
                x = change(x, rng)
            x = x[rows].contiguous(memory_format=torch.channels_last)
            drawn.append((x, loop.train.labels[positions[rows]]))
        (x, y), *streams = drawn
        batch = Batch(x, y, ids[0][rows], tuple(streams), own)
        progress = (epoch + index / loop.steps_per_epoch) / recipe.epochs
        at = epoch / recipe.epochs if recipe.schedule == "step" else progress
        for group in loop.optimizer.param_groups:
            group["lr"] = recipe.lr_at(at)
        for terms in _steps(loop, batch, progress, loop.share.weight(total), f"epoch {epoch}, batch {index}"):
            logged.append((index, terms))
            if device.type == "cpu":  # reading a loss on the GPU would stall it; there the epoch's end must do
                _check(logged[-1:], epoch)
        advance(1)
    _check(logged, epoch)
    names = {name for _, terms in logged for name in terms}
    return {
        name: float(torch.stack([terms[name].float() for _, terms in logged if name in terms]).mean())
        for name in sorted(names)
    }


def _begin_batch(loop: _Loop, rng: torch.Generator, rows: slice, total: int, at: tuple[int, int]) -> torch.Generator:
    """Prepare the inner adversary; returns the generator that the defence draws from.

    Alone, that is ``rng``. Of several processes each has its own: from the same one, the first image of every process
    would get the same noise.
    """
    if loop.share.alone:
        loop.adversary.begin_batch(rng)
        return rng
    own = derived_generator(loop.fabric.device, loop.spec.setting.seed, *at, 1, loop.share.rank)
    loop.adversary.begin_batch(rng, Part(rows, total, own))
    return own


def _steps(loop: _Loop, batch: Batch, progress: float, weight: float, where: str) -> Iterator[Terms]:
    """One optimiser step for each dict of terms the defence gives; ``weight`` is that of this share of the batch."""
    moved = [parameter for group in loop.optimizer.param_groups for parameter in group["params"]]
    with loop.fabric.autocast():
        result = loop.defense.loss(batch, progress)
    if not isinstance(result, dict | Iterator):
        raise PluginError(
            f"{loop.spec.method}.loss returned {type(result).__name__}; expected a dict of named scalars, or a "
            "generator of such dicts"
        )
    pending: Iterator[Terms] = iter([result]) if isinstance(result, dict) else result
    for step in itertools.count():
        with loop.fabric.autocast():
            terms = next(pending, None)
        if terms is None:
            return
        loop.optimizer.zero_grad(set_to_none=True)
        loop.fabric.backward(torch.stack([value.float() for value in terms.values()]).sum() * weight)
        terms = loop.share.add_up(moved, terms, weight, f"{where}, step {step}")
        loop.optimizer.step()
        yield {name: value.detach() for name, value in terms.items()}


def _check(logged: list[tuple[int, Terms]], epoch: int) -> None:
    for index, terms in logged:
        for name, value in terms.items():
            if not bool(torch.isfinite(value)):
                raise TrainingDiverged(
                    f"loss term {name!r} is {float(value)} in epoch {epoch}, batch {index}; lower "
                    "the learning rate or the weight of that term"
                )


def _check_weights(loop: _Loop, epoch: int) -> None:
    """A finite loss may have had an infinite gradient: the last step of an epoch must not go unseen."""
    broken = [
        name
        for name, tensor in loop.defense.state_dict().items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
    loop.share.meet(f"the end of epoch {epoch}")
    if loop.share.any(bool(broken)):  # running statistics may break in one process alone
        told = f"weights {broken[0]!r}" if broken else "weights of another process"
        raise TrainingDiverged(f"{told} are not finite after epoch {epoch}; lower the learning rate")


def freeze_the_rest(defense: EnsembleDefense) -> list[nn.Parameter]:
    """The parameters that training moves; all others stop asking for a gradient."""
    moved = [parameter for parameter in defense.trainable() if parameter.requires_grad]
    still = {id(parameter) for parameter in defense.parameters()} - {id(parameter) for parameter in moved}
    for parameter in defense.parameters():
        if id(parameter) in still:
            parameter.requires_grad_(False)
    return moved


def training_mode(defense: EnsembleDefense) -> None:
    """Train mode, except for modules that hold frozen parameters alone: their buffers must not move either."""
    defense.train()
    for module in defense.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def _robust_accuracy(loop: _Loop, split: Split) -> float:
    """Accuracy on the held-out images under the inner attack on ``predict``, in [0, 1].

    The same radius and the same random starts in every epoch, so that epochs are compared and not draws.
    """
    loop.defense.eval()
    loop.adversary.begin_batch(derived_generator(loop.fabric.device, loop.spec.setting.seed, -3))
    threat = Threat(loop.adversary.norm, loop.adversary.eps[1])
    right = 0
    for begin in range(0, len(split), loop.recipe.batch_size):
        window = slice(begin, begin + loop.recipe.batch_size)
        x, y = split.x(window), split.labels[window]
        x_adv = loop.adversary(lambda x, y=y: cross_entropy(loop.defense.predict(x), y), x, threat=threat)  # type: ignore[misc]
        with torch.no_grad():
            right += int((loop.defense.predict(x_adv).argmax(dim=1) == y).sum())
    return right / max(1, len(split))


def _examine(loop: _Loop) -> list[training_health.Finding]:
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


def _snapshot(defense: EnsembleDefense) -> dict[str, Tensor]:
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in defense.state_dict().items()
    }
