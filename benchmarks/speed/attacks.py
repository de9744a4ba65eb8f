"""Other attacks on one ensemble: the library that has them, against ensdef. Same module, same images, one process.

    python benchmarks/speed/attacks.py --checkpoint results/checkpoints/adv_en-... \
        --dataset imagefolder --data-dir DIR --samples 48 --eps 0.03 [--only square,spsa]

Baselines get the module as `load_checkpoint` gives it and run in fp32 on the images it has right; what they offer is
recounted by one fresh pass of the untouched module. Ours is timed whole: clean pass, copies, attack, recount.

- `autoattack`: pyautoattack, `standard`; ours through the adapter;
- `square`: pyautoattack's Square with 5,000 queries; ours with images of their own squares;
- `spsa`: torchattacks' SPSA, 50 steps of 128 evaluations;
- `deepfool`: foolbox's and torchattacks' l2 attack, radius 128/255.

`agrees`: the success rates differ by less than one standard error of their difference.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from tabulate import tabulate
from torch import Tensor, nn

import ensdef
from ensdef.attack_spec import AttackSpec
from ensdef.harness import attack_model
from ensdef.loading import attacked_subset, find_data
from ensdef.notation import fraction, split_list

#: Offers adversarial points for images and labels at a radius.
Baseline = Callable[[nn.Module, Tensor, Tensor, float], Tensor]
L2 = "128/255"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder of a trained defence")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data-dir")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--eps", default="0.03")
    parser.add_argument("--only", default="autoattack,square,spsa,deepfool")
    options = parser.parse_args()

    model = ensdef.load_checkpoint(options.checkpoint)
    data, _ = find_data(options.dataset, options.data_dir)
    test, ids = attacked_subset(data, options.samples)
    x, y = test.x(), test.labels
    clean = right(model, x, y)
    label = f"{model.spec.method_call}, {model.spec.members} x {model.spec.architecture_call}"
    print(f"{label}, {options.dataset}, {len(x)} images, {int(clean.sum())} right, eps {options.eps} (l2: {L2}), "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}\n", flush=True)  # fmt: skip

    rows = []
    for name in split_list(options.only):
        norm, eps = ("l2", L2) if name == "deepfool" else ("linf", options.eps)
        fastest = None
        for library, run in BASELINES[name].items():
            torch.manual_seed(0)
            began = time.perf_counter()
            offered = run(model, x[clean], y[clean], float(fraction(eps, "eps")))
            seconds = time.perf_counter() - began
            near = within(offered, x[clean], norm, float(fraction(eps, "eps")))
            robust = right(model, torch.where(near, offered, x[clean]), y[clean])
            rows.append(entry(name, library, int(robust.sum()), len(x), seconds))
            if fastest is None or seconds < fastest[0]:
                fastest = seconds, int(robust.sum())
        assert fastest is not None
        for search in ("fp32", "bf16", "bf16+fp32"):
            spec = AttackSpec.create(name, {}, norm, eps, search=search)
            began = time.perf_counter()
            outcome = attack_model(model, x, y, spec, ids=ids, health="off")
            seconds = time.perf_counter() - began
            left = int((outcome.robust & right(model, outcome.x_adv, y)).sum())
            rows.append(entry(name, f"ensdef, {search}", left, len(x), seconds, *fastest))
        print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True), "\n", flush=True)


def entry(attack: str, engine: str, robust: int, count: int, seconds: float, fastest: float | None = None,
          theirs: int = 0) -> dict[str, str]:  # fmt: skip
    """A row of the table."""
    share, other = robust / count, theirs / count
    error = ((share * (1 - share) + other * (1 - other)) / count) ** 0.5
    return {
        "attack": attack,
        "engine": engine,
        "robust": f"{share:.1%}",
        "seconds": f"{seconds:.1f}",
        "times faster": "" if fastest is None else f"{fastest / seconds:.2f}",
        "agrees": "" if fastest is None else "yes" if abs(share - other) <= error else "no",
    }


def official_autoattack(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    from pyautoattack import AutoAttack

    attack = AutoAttack(model, norm="Linf", eps=eps, seed=0, version="standard")
    targets = min(9, model(x[:1]).shape[1] - 1)
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
    return attack.run_standard_evaluation(x, y, batch_size=250)[0]


def official_square(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    from pyautoattack.square import SquareAttack

    attack = SquareAttack(
        model, p_init=0.8, n_queries=5000, eps=eps, norm="Linf", n_restarts=1, seed=0, device=x.device
    )
    return attack.perturb(x, y)


def torchattacks_spsa(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    import torchattacks

    attack = torchattacks.SPSA(model, eps=eps, delta=0.01, lr=0.01, nb_iter=50, nb_sample=64, max_batch_size=64)
    return torch.cat([attack(a, b) for a, b in zip(x.split(64), y.split(64), strict=True)])


def torchattacks_deepfool(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    import torchattacks

    points: Tensor = torchattacks.DeepFool(model, steps=50, overshoot=0.02)(x, y)
    return points


def foolbox_deepfool(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    import foolbox

    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
    attack = foolbox.attacks.L2DeepFoolAttack(steps=50, overshoot=0.02)
    points: Tensor = attack(wrapped, x, foolbox.criteria.Misclassification(y), epsilons=None)[0]
    return points


BASELINES: dict[str, dict[str, Baseline]] = {
    "autoattack": {"pyautoattack": official_autoattack},
    "square": {"pyautoattack": official_square},
    "spsa": {"torchattacks": torchattacks_spsa},
    "deepfool": {"torchattacks": torchattacks_deepfool, "foolbox": foolbox_deepfool},
}


def within(offered: Tensor, x: Tensor, norm: str, eps: float) -> Tensor:
    """Whether points lie in the ball, broadcastable over images."""
    order = torch.inf if norm == "linf" else 2
    distance = torch.linalg.vector_norm((offered - x).flatten(1), ord=order, dim=1)
    return (distance <= eps + 1e-5).view(-1, *[1] * (x.dim() - 1))


def right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Whether the untouched module is right, (N,) bool."""
    with torch.no_grad():
        return torch.cat([model(part).argmax(dim=1) for part in x.split(250)]) == y


if __name__ == "__main__":
    main()
