"""What a training is made of between two epochs, so that another process can go on with it to the same weights.

Weights and buffers, the optimiser's state, torch's global random state, what the loop remembers, and the plain
attributes (numbers, texts, None) of the defence's modules. Everything else is drawn anew from (seed, epoch, batch).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ensdef.folding import plain_attributes
from ensdef.journal import Snapshot
from ensdef.peak import peak
from ensdef.training_loop import TrainingLoop


def snapshot(loop: TrainingLoop) -> Snapshot:
    """The state of a training that no other process shares, after its last finished epoch."""
    device = loop.fabric.device
    tensors: dict[str, Tensor] = {f"model.{name}": value for name, value in loop.last_good.items()}
    numbers: dict[str, dict[str, Any]] = {}
    for index, state in loop.optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                numbers.setdefault(str(index), {})[name] = value
    tensors["random.cpu"] = torch.get_rng_state()
    if device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    if loop.best is not None:
        tensors |= {f"best.{name}": value for name, value in loop.best[1].items()}
    return Snapshot(
        tensors,
        {
            "epoch": loop.epoch,
            "history": loop.history,
            "best": None if loop.best is None else loop.best[0],
            "optimizer": numbers,
            "attributes": {name: plain_attributes(module) for name, module in loop.defense.named_modules()},
            "seconds": loop.seconds,
            "peak": max(peak(device.type), loop.peak_before),
        },
    )


def restore(loop: TrainingLoop, kept: Snapshot) -> None:
    """Bring a loop that was just prepared to where another process left it.

    Raises:
        KeyError, ValueError, RuntimeError: the state is not one of this training.
    """
    values = kept.values
    loop.defense.load_state_dict(kept.under("model."))
    for name, module in loop.defense.named_modules():
        vars(module).update(values["attributes"][name])
    optimizer: dict[int, dict[str, Any]] = {int(index): dict(state) for index, state in values["optimizer"].items()}
    for name, tensor in kept.under("optimizer.").items():
        index, _, what = name.partition(".")
        optimizer.setdefault(int(index), {})[what] = tensor
    groups = loop.optimizer.state_dict()["param_groups"]
    loop.optimizer.load_state_dict({"state": optimizer, "param_groups": groups})
    torch.set_rng_state(kept.tensors["random.cpu"])
    if loop.fabric.device.type == "cuda":
        torch.cuda.set_rng_state(kept.tensors["random.cuda"], loop.fabric.device)
    loop.last_good = kept.under("model.")
    loop.best = None if values["best"] is None else (values["best"], kept.under("best."))
    loop.epoch, loop.history = values["epoch"], values["history"]
    loop.earlier, loop.peak_before = values["seconds"], values["peak"]
