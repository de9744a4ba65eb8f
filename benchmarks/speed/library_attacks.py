"""Other attacks on one ensemble: the library that has them, against ensdef. Same module, same images, one process.

    python benchmarks/speed/library_attacks.py --checkpoint results/checkpoints/adv_en-... --data-dir DIR \
        --samples 48 [--only square,spsa] [--floor]

Libraries get the module as `load_checkpoint` gives it and run in fp32. Gradient attacks are given all images, as their
documentation does; the others, which take long, only those that the model has right.

- `bim`, `mim`: torchattacks, 20 steps of eps/5;
- `cw`: foolbox's PGD, 50 steps of eps/5, on the margin of Carlini and Wagner (torchattacks has their minimum-norm
  attack alone, which is another thing);
- `mul_pgd`: nine targeted PGDs of 20 steps of eps/4 in torchattacks' `MultiAttack`, which drops fooled images between;
- `autoattack`: pyautoattack, `standard`; ours through the adapter;
- `square`: pyautoattack's Square; ours with images of their own squares;
- `spsa`: torchattacks' SPSA, steps of 128 evaluations;
- `deepfool`: foolbox's and torchattacks' l2 attack.

`--floor`: at a radius so small that every image survives, so that only the cost of a pass and of what surrounds it
differs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from comparison import Comparison, Library, compare, library, searches, table
from machine import machine
from subject import Subject, add_arguments, chosen
from torch import Tensor, nn

from ensdef.losses import margin
from ensdef.notation import split_list
from ensdef.registry import ATTACKS

MODES = ("fp32", "bf16", "bf16+fp32")


@dataclass(frozen=True)
class Duel:
    """An attack that others have as well.

    Args:
        libraries: by name.
        params: of ours.
        right_only: libraries are given only the images that are right.
        aims: times faster than each of them, by search mode: on the ensemble, and where every image survives.
    """

    libraries: dict[str, Library]
    params: dict[str, Any] = field(default_factory=dict)
    norm: str = "linf"
    right_only: bool = True
    aims: dict[str, float] = field(default_factory=dict)
    floor_aims: dict[str, float] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, samples=48)
    parser.add_argument("--only", default="autoattack,square,spsa,deepfool")
    parser.add_argument("--floor", action="store_true")
    options = parser.parse_args()
    subject = chosen(options)
    subject.warm_up()
    print(f"{machine()}; {subject}\n", flush=True)
    for name in split_list(options.only):
        print(table(attack(subject, name, floor=options.floor).rows), "\n", flush=True)


def attack(
    subject: Subject, name: str, modes: Sequence[str] = MODES, *, floor: bool = False, **sizes: int
) -> Comparison:
    """One attack by every library that has it, and by us.

    Args:
        floor: at a radius where every image survives, on the images that are right.
        sizes: ``queries`` of Square, ``steps`` of SPSA, for both sides.
    """
    duel = DUELS[name](**sizes)
    subject = subject.floor() if floor else subject
    libraries = {
        label: library(subject, offer, duel.norm, right_only=duel.right_only) for label, offer in duel.libraries.items()
    }
    modes = modes if ATTACKS.get(name).low_precision else ("fp32",)
    ours = searches(subject, name, duel.norm, modes, **duel.params)
    aims = dict.fromkeys(libraries, duel.floor_aims if floor else duel.aims)
    return compare(f"{name}, none falls" if floor else name, libraries, ours, aims)


def bim() -> Duel:
    def torchattacks_bim(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> list[Tensor]:
        import torchattacks

        return [torchattacks.BIM(model, eps=eps, alpha=eps / 5, steps=20)(x, y)]

    return _gradient({"torchattacks": torchattacks_bim})


def mim() -> Duel:
    def torchattacks_mim(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> list[Tensor]:
        import torchattacks

        return [torchattacks.MIFGSM(model, eps=eps, alpha=eps / 5, steps=20, decay=1.0)(x, y)]

    return _gradient({"torchattacks": torchattacks_mim})


def cw() -> Duel:
    def foolbox_margin(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> list[Tensor]:
        import eagerpy
        import foolbox

        class MarginPGD(foolbox.attacks.LinfProjectedGradientDescentAttack):
            def get_loss_fn(self, model: Any, labels: Any) -> Any:
                return lambda points: eagerpy.astensor(margin(model(points).raw, labels.raw).sum())

        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
        run = MarginPGD(steps=50, rel_stepsize=1 / 5)
        return [run(wrapped, x, foolbox.criteria.Misclassification(y), epsilons=eps)[0]]

    return _gradient({"foolbox": foolbox_margin})


def mul_pgd() -> Duel:
    def torchattacks_targeted(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> list[Tensor]:
        import torchattacks

        classes = model(x[:1]).shape[1]
        runs = []
        for turn in range(1, classes):
            run = torchattacks.PGD(model, eps=eps, alpha=eps / 4, steps=20)
            run.set_mode_targeted_by_function(lambda _, labels, turn=turn: (labels + turn) % classes, quiet=True)
            runs.append(run)
        return [torchattacks.MultiAttack(runs)(x, y)]

    return _gradient({"MultiAttack": torchattacks_targeted})


def _gradient(libraries: dict[str, Library]) -> Duel:
    return Duel(libraries, right_only=False, aims={"fp32": 2.2}, floor_aims={"fp32": 1.5})


def autoattack() -> Duel:
    def official(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> list[Tensor]:
        from pyautoattack import AutoAttack

        attack = AutoAttack(model, norm="Linf", eps=eps, seed=0, version="standard")
        targets = min(9, model(x[:1]).shape[1] - 1)
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
        return [attack.run_standard_evaluation(x, y, batch_size=250)[0]]

    return Duel({"pyautoattack": official}, aims={"fp32": 1.4, "bf16": 2.0})


def square(queries: int = 5000) -> Duel:
    def official(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> list[Tensor]:
        from pyautoattack.square import SquareAttack

        attack = SquareAttack(
            model, p_init=0.8, n_queries=queries, eps=eps, norm="Linf", n_restarts=1, seed=0, device=x.device
        )
        return [attack.perturb(x, y)]

    return Duel({"pyautoattack": official}, {"queries": queries}, aims={"fp32": 1.5, "bf16": 2.5})


def spsa(steps: int = 50) -> Duel:
    def torchattacks_spsa(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> list[Tensor]:
        import torchattacks

        run = torchattacks.SPSA(model, eps=eps, delta=0.01, lr=0.01, nb_iter=steps, nb_sample=64, max_batch_size=64)
        return [run(x, y)]

    return Duel({"torchattacks": torchattacks_spsa}, {"steps": steps}, aims={"fp32": 2.0})


def deepfool() -> Duel:
    def torchattacks_deepfool(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> list[Tensor]:
        import torchattacks

        return [torchattacks.DeepFool(model, steps=50, overshoot=0.02)(x, y)]

    def foolbox_deepfool(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> list[Tensor]:
        import foolbox

        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
        run = foolbox.attacks.L2DeepFoolAttack(steps=50, overshoot=0.02)
        return [run(wrapped, x, foolbox.criteria.Misclassification(y), epsilons=None)[0]]

    libraries: dict[str, Library] = {"torchattacks": torchattacks_deepfool, "foolbox": foolbox_deepfool}
    return Duel(libraries, norm="l2", aims={"fp32": 2.0})


DUELS: dict[str, Callable[..., Duel]] = {
    builder.__name__: builder for builder in (bim, mim, cw, mul_pgd, autoattack, square, spsa, deepfool)
}


if __name__ == "__main__":
    main()
