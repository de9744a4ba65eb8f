"""One loop that trains every defence: a specification and data in, weights and a report out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from ensdef import augment, training_health
from ensdef.adversary import Adversary
from ensdef.backend import safe_convolutions
from ensdef.build import build_defense
from ensdef.checkpoints import packed
from ensdef.data import Data, Split
from ensdef.defense import Batch, EnsembleDefense, Terms
from ensdef.errors import PluginError, TrainingDiverged
from ensdef.footnotes import flag_note
from ensdef.losses import cross_entropy
from ensdef.progress import Progress
from ensdef.recipe import Recipe, parse_train_eps
from ensdef.registry import METHODS
from ensdef.rng import derived_generator
from ensdef.specs import TrainSpec
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
    progress: Progress | None = None,
) -> Trained:
    """Train a defence from scratch (or from its prerequisites).

    Args:
        spec: method, architecture, recipe, inner attack, seed.
        data: the data set the specification names, loaded and limited.
        prerequisites: trained defences by role, as ``spec.prerequisites`` names them.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        progress: told after every batch.
    Raises:
        TrainingDiverged: a loss term is NaN or infinite; carries the weights of the last good epoch.
    """
    progress = progress or Progress()
    began = time.monotonic()
    fabric = Fabric(
        accelerator=device, devices=1, precision="bf16-mixed" if spec.setting.precision == "bf16" else "32-true"
    )
    with torch.random.fork_rng():
        torch.manual_seed(spec.setting.seed)  # for dropout, which draws from the global state
        defense = build_defense(spec.model, spec.setting.seed)
        defense.warm_start(prerequisites or {})
        defense.to(device=fabric.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        loop, holdout = _prepare(spec, defense, data, fabric)
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
                    _check_weights(defense, epoch)
                except TrainingDiverged as error:
                    raise TrainingDiverged(str(error), packed(last_good)) from error
                if loop.recipe.keep == "best":
                    score = _robust_accuracy(loop, holdout)
                    terms["holdout_robust_accuracy"] = score
                    if best is None or score > best[0]:
                        best = (score, _snapshot(defense))
                loop.history.append(terms)
                last_good = _snapshot(defense)
        if best is not None:
            defense.load_state_dict(best[1])
        health = _examine(loop)
    for finding in health:
        progress.message(f"{spec.model.method_call} seed {spec.setting.seed}: {flag_note(finding)}")
    defense.lend(None)
    defense.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return Trained(
        defense.eval(),
        {
            "seconds": time.monotonic() - began,
            "history": loop.history,
            "kept": "best epoch by robust accuracy on held-out training images" if best else "last epoch",
            "images_seen": loop.recipe.epochs * min(len(loop.train), loop.steps_per_epoch * loop.recipe.batch_size),
            "device": str(fabric.device),
            "health": health,
        },
    )


def _prepare(spec: TrainSpec, defense: EnsembleDefense, data: Data, fabric: Fabric) -> tuple[_Loop, Split]:
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
    return _Loop(spec, defense, adversary, fabric, fabric.setup_optimizers(optimizer), train, steps), holdout


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
        loop.adversary.begin_batch(rng)
        window = slice(index * recipe.batch_size, (index + 1) * recipe.batch_size)
        drawn = []
        for order in orders:
            x = loop.train.x(order[window])
            for change in augmentations:
                x = change(x, rng)
            drawn.append((x.contiguous(memory_format=torch.channels_last), loop.train.labels[order[window]]))
        (x, y), *streams = drawn
        batch = Batch(x, y, orders[0][window], tuple(streams), rng)
        progress = (epoch + index / loop.steps_per_epoch) / recipe.epochs
        at = epoch / recipe.epochs if recipe.schedule == "step" else progress
        for group in loop.optimizer.param_groups:
            group["lr"] = recipe.lr_at(at)
        for terms in _steps(loop, batch, progress):
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


def _steps(loop: _Loop, batch: Batch, progress: float) -> Iterator[Terms]:
    """One optimiser step for each dict of terms the defence gives."""
    with loop.fabric.autocast():
        result = loop.defense.loss(batch, progress)
    if not isinstance(result, dict | Iterator):
        raise PluginError(
            f"{loop.spec.method}.loss returned {type(result).__name__}; expected a dict of named scalars, or a "
            "generator of such dicts"
        )
    pending: Iterator[Terms] = iter([result]) if isinstance(result, dict) else result
    while True:
        with loop.fabric.autocast():
            terms = next(pending, None)
        if terms is None:
            return
        loop.optimizer.zero_grad(set_to_none=True)
        loop.fabric.backward(torch.stack([value.float() for value in terms.values()]).sum())
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


def _check_weights(defense: EnsembleDefense, epoch: int) -> None:
    """A finite loss may have had an infinite gradient: the last step of an epoch must not go unseen."""
    for name, tensor in defense.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise TrainingDiverged(f"weights {name!r} are not finite after epoch {epoch}; lower the learning rate")


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
