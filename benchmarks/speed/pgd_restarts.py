"""PGD with restarts on one ensemble: torchattacks, twice, against ensdef.

    python benchmarks/speed/pgd_restarts.py --checkpoint results/checkpoints/adv_en-... \
        --dataset imagefolder --data-dir DIR --samples 512 --eps 0.03

Baselines: `loop` runs torchattacks' PGD `restarts` times on all images and combines the worst case; `MultiAttack` is
what its documentation recommends, which drops fooled images between restarts. Both judge the last iterate of a run
(`last`) on the module as `load_checkpoint` gives it; ours judges every iterate (`any`), which can only find more.
All robust accuracies are recounted by one fresh pass of the untouched module in fp32.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torchattacks
from tabulate import tabulate
from torch import Tensor, nn

import ensdef
from ensdef.attack_spec import AttackSpec
from ensdef.harness import attack_model
from ensdef.loading import attacked_subset, find_data
from ensdef.notation import fraction


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder of a trained defence")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data-dir")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--eps", default="0.03")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--restarts", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--skip-loop", action="store_true", help="leave the slowest baseline out")
    options = parser.parse_args()

    model = ensdef.load_checkpoint(options.checkpoint)
    data, _ = find_data(options.dataset, options.data_dir)
    test, ids = attacked_subset(data, options.samples)
    x, y = test.x(), test.labels
    eps = float(fraction(options.eps, "eps"))

    def theirs(run: Callable[[Tensor, Tensor], list[Tensor]]) -> tuple[float, Tensor]:
        began = time.perf_counter()
        offered = [run(a, b) for a, b in zip(x.split(options.batch_size), y.split(options.batch_size), strict=True)]
        seconds = time.perf_counter() - began
        robust = right(model, x, y)
        for points in zip(*offered, strict=True):
            robust &= right(model, torch.cat(points), y)
        return seconds, robust

    def pgd() -> torchattacks.PGD:
        return torchattacks.PGD(model, eps=eps, alpha=eps / 5, steps=options.steps, random_start=True)

    def ours(search: str) -> tuple[float, Tensor]:
        spec = AttackSpec.create("pgd", {"steps": options.steps, "restarts": options.restarts}, "linf", options.eps,
                                 search=search)  # fmt: skip
        began = time.perf_counter()
        outcome = attack_model(model, x, y, spec, ids=ids, batch_size=options.batch_size)
        seconds = time.perf_counter() - began
        return seconds, outcome.robust & right(model, outcome.x_adv, y)

    rows: list[tuple[str, str, float, Tensor]] = []
    torch.manual_seed(0)
    if not options.skip_loop:
        rows.append(("torchattacks PGD, loop over restarts", "last",
                     *theirs(lambda a, b: [pgd()(a, b) for _ in range(options.restarts)])))  # fmt: skip
    multi = torchattacks.MultiAttack([pgd() for _ in range(options.restarts)])
    rows.append(("torchattacks MultiAttack", "last", *theirs(lambda a, b: [multi(a, b)])))
    for search in ("fp32", "bf16", "bf16+fp32"):
        rows.append((f"ensdef, search {search}", "any", *ours(search)))

    loop = rows[0][2] if not options.skip_loop else float("nan")
    fair = rows[0 if options.skip_loop else 1][2]
    clean = float(right(model, x, y).float().mean())
    label = f"{model.spec.method_call}, {model.spec.members} x {model.spec.architecture_call}"
    print(f"{label}, {options.dataset}, {len(x)} images, clean {clean:.2%}; PGD {options.steps} x {options.restarts}, "
          f"eps {options.eps}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")  # fmt: skip
    print(tabulate([(name, success, f"{float(robust.float().mean()):.2%}", f"{seconds:.1f}", f"{fair / seconds:.2f}",
                     f"{loop / seconds:.2f}") for name, success, seconds, robust in rows],
                   headers=["engine", "success", "robust", "seconds", "x MultiAttack", "x loop"], tablefmt="github",
                   disable_numparse=True))  # fmt: skip


def right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Whether the untouched module is right, (N,) bool."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part).argmax(dim=1) for part in x.split(250)]) == y


if __name__ == "__main__":
    main()
