"""Distance to the limit: arithmetic against the machine's peak, and passes against the least that the protocol needs.

    python benchmarks/speed/limits.py --checkpoint results/checkpoints/adv_en-... --data-dir DIR

- FLOP/s: operations of the passes that a whole attack made (forward and backward of one image counted by torch's
  ``FlopCounterMode`` on the copy that is attacked), over all its seconds: clean pass, copies, steps, projection,
  judgement, recount. The peak is that of a large matrix product in the same precision.
- Passes: the least for PGD is one pass over every image to see whether it is right, another to recount it, one pass
  over every image that falls to see that it did, and for those that survive all steps of all restarts, forward and
  backward, and a pass over the last point of each.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping

import torch
from comparison import Answer, searches, table_of
from machine import machine, multiplies_bf16, peak_flops
from pgd_restarts import pgd
from subject import Subject, add_arguments, chosen
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ensdef.losses import cross_entropy
from ensdef.target import Target

BATCH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, samples=128)
    options = parser.parse_args()
    subject = chosen(options)
    subject.warm_up()
    print(f"{machine()}; {subject}\n", flush=True)
    print(table_of(arithmetic(subject)), "\n", flush=True)
    answers = pgd(subject, modes=("fp32", "bf16"), loop=False).answers
    print(table_of(passes(subject, answers, 50, 5)))


def arithmetic(subject: Subject, steps: int = 20) -> list[dict[str, str]]:
    """A row a precision: FLOP/s of PGD on full batches that no image falls to, against the peak.

    Images are labelled as the model answers, so that all of them are attacked.
    """
    with torch.no_grad():
        answers = torch.cat([subject.model(part).argmax(dim=1) for part in subject.x.split(BATCH)])
    floor = dataclasses.replace(subject, y=answers).floor()
    rows = []
    for precision in ("fp32", "bf16") if multiplies_bf16() else ("fp32",):
        engine = searches(floor, "pgd", "linf", [precision], steps=steps)[precision]
        assert engine is not None
        answer = min((engine() for _ in range(3)), key=lambda one: one.seconds)
        forward, backward = flops_of_a_pass(floor.model, floor.x[:BATCH], floor.y[:BATCH], precision)
        assert answer.backwards is not None
        achieved = (forward * answer.forwards + backward * answer.backwards) / answer.seconds
        peak = peak_flops(precision)
        rows.append(
            {
                "precision": precision,
                "images": str(len(floor)),
                "MFLOP forward, backward": f"{forward / 1e6:.0f}, {backward / 1e6:.0f}",
                "achieved GFLOP/s": f"{achieved / 1e9:.0f}",
                "peak GFLOP/s": f"{peak / 1e9:.0f}",
                "share": f"{achieved / peak:.0%}",
            }
        )
    return rows


def flops_of_a_pass(model: nn.Module, x: Tensor, y: Tensor, precision: str) -> tuple[float, float]:
    """Operations of the ensemble for one image: forward, and backward to the image."""
    target = Target(model, precision=precision)
    point = x.clone(memory_format=target.memory_format).requires_grad_()
    counter = FlopCounterMode(display=False)
    with counter:
        loss = cross_entropy(target(point), y).sum()
        forward = counter.get_total_flops()
        loss.backward()  # not autograd.grad: the counter's own hooks fail with it
    return forward / len(x), (counter.get_total_flops() - forward) / len(x)


def passes(subject: Subject, answers: Mapping[str, Answer], steps: int, restarts: int) -> list[dict[str, str]]:
    """A row for each of our engines that counts its passes: made, needed, and their ratio."""
    rows = []
    for engine, answer in answers.items():
        if answer.backwards is not None:
            made = answer.forwards + answer.backwards
            least = least_passes(subject, answer, steps, restarts)
            rows.append(
                {"engine": engine, "passes": f"{made:,.0f}", "least": f"{least:,}", "ratio": f"{made / least:.3f}"}
            )
    return rows


def least_passes(subject: Subject, answer: Answer, steps: int, restarts: int) -> int:
    """Forward and backward passes over single images that PGD cannot do without."""
    survive = int(answer.robust.sum())
    fall = int(subject.clean.sum()) - survive
    return 2 * len(subject) + fall + survive * restarts * (2 * steps + 1)


if __name__ == "__main__":
    main()
