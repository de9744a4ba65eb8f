"""The epochs of one training: what is drawn, what is stepped, what is checked, and which weights are worth keeping."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from ensdef import augment
from ensdef.adversary import Adversary, Part
from ensdef.backend import safe_convolutions
from ensdef.checkpoints import packed
from ensdef.data import Data, Split
from ensdef.defense import Batch, EnsembleDefense, Terms
from ensdef.errors import PluginError, TrainingDiverged
from ensdef.losses import cross_entropy
from ensdef.parallel import Share
from ensdef.progress import Advance
from ensdef.recipe import Recipe, parse_train_eps
from ensdef.rng import derived_generator
from ensdef.specs import TrainSpec
from ensdef.threat import Threat

#: Share of the training images held out where the recipe keeps the best epoch.
HOLDOUT = 0.1

Weights = dict[str, Tensor]


@dataclass
class TrainingLoop:
    """One training, an epoch at a time.

    Args:
        train, holdout: images to train on, and those that tell which epoch is best; on the device.
        share: what this process has of the training.
        epoch: the next one; as many are done.
        history: mean of every term, an entry an epoch.
        last_good: weights after the last epoch, on the CPU.
        best: the highest robust accuracy on held-out images, and its weights; None: the last epoch is kept.
        earlier, peak_before: seconds and bytes of processes that were at it before this one; see ``training_state``.
    """

    spec: TrainSpec
    defense: EnsembleDefense
    adversary: Adversary
    fabric: Fabric
    optimizer: Any
    train: Split
    holdout: Split
    share: Share
    last_good: Weights
    epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best: tuple[float, Weights] | None = None
    earlier: float = 0.0
    peak_before: int = 0
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def prepare(
        cls, spec: TrainSpec, defense: EnsembleDefense, data: Data, fabric: Fabric, share: Share
    ) -> TrainingLoop:
        """Hold images out, lend the inner adversary, choose what moves; the defence is on the device."""
        recipe, images = spec.recipe, data.train
        held = round(HOLDOUT * len(images)) if recipe.keep == "best" else 0
        order = torch.randperm(len(images), generator=derived_generator(torch.device("cpu"), spec.setting.seed, -2))
        holdout, train = images.select(order[:held]), images.select(order[held:].sort().values)
        low, high = parse_train_eps(spec.setting.train_eps, spec.setting.norm)
        adversary = Adversary(defense, recipe.attack, spec.setting.norm, (float(low), float(high)))
        defense.lend(adversary)
        moved = freeze_the_rest(defense)
        optimizer: torch.optim.Optimizer
        if recipe.optimizer == "adam":
            optimizer = torch.optim.Adam(moved, lr=recipe.lr, weight_decay=recipe.weight_decay, eps=1e-7)
        else:
            optimizer = torch.optim.SGD(moved, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
        return cls(
            spec,
            defense,
            adversary,
            fabric,
            fabric.setup_optimizers(optimizer),
            train.to(fabric.device),
            holdout.to(fabric.device),
            share,
            weights_of(defense),
        )

    @property
    def recipe(self) -> Recipe:
        return self.spec.recipe

    @property
    def steps_per_epoch(self) -> int:
        """Batches; a last one of a single image is left out."""
        count, size = len(self.train), self.recipe.batch_size
        return max(1, -(-count // size) - (count % size == 1))

    @property
    def seconds(self) -> float:
        """Spent on this training until now, by all processes that were at it."""
        return self.earlier + time.monotonic() - self.began

    def run_epoch(self, advance: Advance) -> None:
        """The next epoch.

        Args:
            advance: told after every batch.
        Raises:
            TrainingDiverged: a loss term or a weight is NaN or infinite; carries the weights of the last good epoch.
        """
        epoch, seed = self.epoch, self.spec.setting.seed
        self.defense.begin_epoch(epoch, derived_generator(torch.device("cpu"), seed, epoch, -1))
        try:
            with safe_convolutions(self.defense, self.fabric.device):
                terms = self._batches(epoch, advance)
            self._check_weights(epoch)
        except TrainingDiverged as error:
            raise TrainingDiverged(str(error), packed(self.last_good)) from error
        if self.recipe.keep == "best" and self.share.rank == 0:
            score = self._robust_accuracy()
            terms["holdout_robust_accuracy"] = score
            if self.best is None or score > self.best[0]:
                self.best = (score, weights_of(self.defense))
        self.last_good = weights_of(self.defense)
        self.history.append(terms)
        self.epoch += 1

    def _batches(self, epoch: int, advance: Advance) -> dict[str, float]:
        """One pass over the data; returns the mean of every term."""
        defense, recipe, device = self.defense, self.recipe, self.fabric.device
        training_mode(defense)
        augmentations = augment.parse(str(recipe.augment))
        orders = [
            torch.randperm(
                len(self.train), generator=derived_generator(torch.device("cpu"), self.spec.setting.seed, epoch, stream)
            ).to(device)
            for stream in range(defense.streams)
        ]
        logged: list[tuple[int, Terms]] = []
        for index in range(self.steps_per_epoch):
            rng = derived_generator(device, self.spec.setting.seed, epoch, index, 1)
            ids = [order[index * recipe.batch_size : (index + 1) * recipe.batch_size] for order in orders]
            total = len(ids[0])
            rows = self.share.rows(total)
            own = self._begin_batch(rng, rows, total, (epoch, index))
            drawn = []
            for positions in ids:
                x = self.train.x(positions)
                for change in augmentations:  # of the whole batch, so that all processes go on drawing the same
                    x = change(x, rng)
                x = x[rows].contiguous(memory_format=torch.channels_last)
                drawn.append((x, self.train.labels[positions[rows]]))
            (x, y), *streams = drawn
            batch = Batch(x, y, ids[0][rows], tuple(streams), own)
            progress = (epoch + index / self.steps_per_epoch) / recipe.epochs
            at = epoch / recipe.epochs if recipe.schedule == "step" else progress
            for group in self.optimizer.param_groups:
                group["lr"] = recipe.lr_at(at)
            for terms in self._steps(batch, progress, self.share.weight(total), f"epoch {epoch}, batch {index}"):
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

    def _begin_batch(self, rng: torch.Generator, rows: slice, total: int, at: tuple[int, int]) -> torch.Generator:
        """Prepare the inner adversary; returns the generator that the defence draws from.

        Alone, that is ``rng``. Of several processes each has its own: from the same one, the first image of every
        process would get the same noise.
        """
        if self.share.alone:
            self.adversary.begin_batch(rng)
            return rng
        own = derived_generator(self.fabric.device, self.spec.setting.seed, *at, 1, self.share.rank)
        self.adversary.begin_batch(rng, Part(rows, total, own))
        return own

    def _steps(self, batch: Batch, progress: float, weight: float, where: str) -> Iterator[Terms]:
        """One optimiser step a dict of terms that the defence gives; ``weight`` is that of this share of the batch."""
        moved = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        with self.fabric.autocast():
            result = self.defense.loss(batch, progress)
        if not isinstance(result, dict | Iterator):
            raise PluginError(
                f"{self.spec.method}.loss returned {type(result).__name__}; expected a dict of named scalars, or a "
                "generator of such dicts"
            )
        pending: Iterator[Terms] = iter([result]) if isinstance(result, dict) else result
        for step in itertools.count():
            with self.fabric.autocast():
                terms = next(pending, None)
            if terms is None:
                return
            self.optimizer.zero_grad(set_to_none=True)
            self.fabric.backward(torch.stack([value.float() for value in terms.values()]).sum() * weight)
            terms = self.share.add_up(moved, terms, weight, f"{where}, step {step}")
            self.optimizer.step()
            yield {name: value.detach() for name, value in terms.items()}

    def _check_weights(self, epoch: int) -> None:
        """A finite loss may have had an infinite gradient: the last step of an epoch must not go unseen."""
        broken = [
            name
            for name, tensor in self.defense.state_dict().items()
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
        ]
        self.share.meet(f"the end of epoch {epoch}")
        if self.share.any(bool(broken)):  # running statistics may break in one process alone
            told = f"weights {broken[0]!r}" if broken else "weights of another process"
            raise TrainingDiverged(f"{told} are not finite after epoch {epoch}; lower the learning rate")

    def _robust_accuracy(self) -> float:
        """Accuracy on the held-out images under the inner attack on ``predict``, in [0, 1].

        The same radius and the same random starts in every epoch, so that epochs are compared and not draws.
        """
        split, size = self.holdout, self.recipe.batch_size
        self.defense.eval()
        self.adversary.begin_batch(derived_generator(self.fabric.device, self.spec.setting.seed, -3))
        threat = Threat(self.adversary.norm, self.adversary.eps[1])
        right = 0
        for begin in range(0, len(split), size):
            x, y = split.x(slice(begin, begin + size)), split.labels[begin : begin + size]
            x_adv = self.adversary(lambda x, y=y: cross_entropy(self.defense.predict(x), y), x, threat=threat)  # type: ignore[misc]
            with torch.no_grad():
                right += int((self.defense.predict(x_adv).argmax(dim=1) == y).sum())
        return right / max(1, len(split))


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


def weights_of(defense: EnsembleDefense) -> Weights:
    """A copy of parameters and buffers on the CPU."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in defense.state_dict().items()
    }


def _check(logged: list[tuple[int, Terms]], epoch: int) -> None:
    for index, terms in logged:
        for name, value in terms.items():
            if not bool(torch.isfinite(value)):
                raise TrainingDiverged(
                    f"loss term {name!r} is {float(value)} in epoch {epoch}, batch {index}; lower "
                    "the learning rate or the weight of that term"
                )
