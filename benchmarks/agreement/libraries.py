"""Do other libraries find the same robust accuracy on our checkpoints, with nothing of ours around them?

    python benchmarks/agreement/libraries.py --checkpoint results/checkpoints/adv_en-... --samples 500 --autoattack

torchattacks and AutoAttack get what `ensdef.load_checkpoint` returns; foolbox wraps it in its own `PyTorchModel`. PGD
runs with equal steps, step size, restarts and loss everywhere and judges the last iterate. Robust means robust to all
restarts; every library's points are recounted by one fresh pass. AutoAttack is the official code (`pyautoattack`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from tabulate import tabulate
from torch import Tensor, nn

import ensdef
from ensdef.loading import attacked_subset, find_data
from ensdef.notation import fraction


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder of a trained defence")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data-dir")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--eps", default="0.2")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--restarts", type=int, default=5)
    parser.add_argument("--autoattack", action="store_true", help="also AutoAttack standard and adaptive (minutes)")
    options = parser.parse_args()

    model = ensdef.load_checkpoint(options.checkpoint)
    data, _ = find_data(options.dataset, options.data_dir)
    test, _ = attacked_subset(data, options.samples)
    x, y = test.x(), test.labels
    eps = float(fraction(options.eps, "eps"))
    size, steps, restarts = eps / 5, options.steps, options.restarts
    print(f"{model.spec.method_call}, {options.dataset}, {len(x)} images, eps {options.eps}, PGD {steps} x {restarts}, "
          f"clean {accuracy(model, [x], y):.2%}\n")  # fmt: skip
    torch.manual_seed(0)

    rows = []
    for success in ("last", "any"):
        record = ensdef.evaluate(model, x, y, eps=options.eps, steps=steps, restarts=restarts, success=success)
        rows.append((f"ensdef pgd, {success}", record.robust_accuracy))
    rows.append(("torchattacks PGD", accuracy(model, torchattacks_pgd(model, x, y, eps, size, steps, restarts), y)))
    rows.append(("foolbox LinfPGD", accuracy(model, foolbox_pgd(model, x, y, eps, size, steps, restarts), y)))
    if options.autoattack:
        rows.append(("official AutoAttack standard", accuracy(model, [autoattack(model, x, y, eps)], y)))
        for call in ("autoattack", "adaptive"):
            record = ensdef.evaluate(model, x, y, attack=call, eps=options.eps)
            rows.append((f"ensdef {call}", record.robust_accuracy))
    ours = rows[0][1]
    print(tabulate([(name, f"{robust:.2%}", f"{100 * (robust - ours):+.1f}") for name, robust in rows],
                   headers=["attack", "robust", "points against ours, last"], tablefmt="github"))  # fmt: skip


def torchattacks_pgd(model: nn.Module, x: Tensor, y: Tensor, eps: float, size: float, steps: int,
                     restarts: int) -> Iterator[Tensor]:  # fmt: skip
    import torchattacks

    for _ in range(restarts):
        yield torchattacks.PGD(model, eps=eps, alpha=size, steps=steps, random_start=True)(x, y)


def foolbox_pgd(model: nn.Module, x: Tensor, y: Tensor, eps: float, size: float, steps: int,
                restarts: int) -> Iterator[Tensor]:  # fmt: skip
    import foolbox

    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
    for _ in range(restarts):
        attack = foolbox.attacks.LinfPGD(abs_stepsize=size, steps=steps, random_start=True)
        yield attack.run(wrapped, x, foolbox.criteria.Misclassification(y), epsilon=eps)


def autoattack(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    from pyautoattack import AutoAttack

    attacked, _ = AutoAttack(model, norm="Linf", eps=eps, seed=0, version="standard").run_standard_evaluation(
        x, y, batch_size=125
    )
    return attacked


def accuracy(model: nn.Module, offered: Iterator[Tensor] | list[Tensor], y: Tensor) -> float:
    """Share of images that the untouched module gets right on every set of points."""
    right = torch.ones_like(y, dtype=torch.bool)
    for points in offered:
        with torch.no_grad():
            right &= torch.cat([model(part).argmax(dim=1) for part in points.split(250)]) == y
    return float(right.float().mean())


if __name__ == "__main__":
    main()
