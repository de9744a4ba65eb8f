"""From an attacked model to a record."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ensdef.adversarial_sets import AdversarialSets
from ensdef.attack_spec import AttackSpec
from ensdef.batch_size import choose_batch_size
from ensdef.data import Split
from ensdef.defense import EnsembleDefense
from ensdef.errors import UsageError
from ensdef.evidence import EvidenceFolder, refused
from ensdef.harness import Outcome, attack_model
from ensdef.health.catalogue import TIERS, Tier, finding
from ensdef.journal import Journal
from ensdef.notation import parse_call
from ensdef.progress import Progress
from ensdef.provenance import provenance
from ensdef.record_cell import attack_fields, blank_record
from ensdef.records import Record, with_outcomes
from ensdef.specs import Cell, cell_key
from ensdef.weights import weights_hash


def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    attack: str = "pgd",
    eps: str | float = "8/255",
    norm: str = "linf",
    success: str = "any",
    search: str = "fp32",
    combiner: str = "native",
    attack_seed: int = 0,
    batch_size: int | None = None,
    device: str = "auto",
    prerequisites: Mapping[str, EnsembleDefense] | None = None,
    health: Tier = "basic",
    progress: Progress | None = None,
    **params: Any,
) -> Record:
    """Attack a model on images in memory.

    Args:
        model: a defence, or any ``nn.Module`` from images in [0, 1] to scores (B, C); it is not changed.
        x: images, (N, C, H, W) or (N, ...), float32 in [0, 1].
        y: labels, (N,), int64.
        attack: registered name, brackets allowed; ``params`` are its parameters (``steps=50, restarts=5``).
        eps, norm: radius, as a number or a fraction in text, and ``"linf"`` or ``"l2"``.
        success: ``"any"`` evaluated iterate, or the ``"last"`` of each run.
        search: ``"fp32"``, ``"bf16"`` (successes re-checked in fp32), ``"bf16+fp32"`` (survivors again in fp32).
        combiner: ``"native"``, or ``avg``, ``max``, ``vote`` in place of the defence's own rule.
        attack_seed: of the keyed random numbers.
        batch_size: rows a pass; cannot change the result. None: 128 on the CPU, measured on a GPU.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        prerequisites: trained defences that the attack asks for, by role (transfer attacks: their surrogates).
        health: of the report that fills ``flags``: ``"basic"``, ``"full"`` or ``"off"``.
    Returns:
        a record; nothing is written.
    Raises:
        UsageError: unknown names, parameters or sizes; images outside [0, 1]; labels of another length.
        PluginError: scores of the wrong shape, NaN, or probabilities.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2 or not len(x):
        raise UsageError("x must be a non-empty float tensor (N, ...) with images in [0, 1]")
    if not bool(torch.isfinite(x).all()) or float(x.min()) < 0 or float(x.max()) > 1:
        raise UsageError(
            f"images must be in [0, 1], got values from {float(x.min()):g} to {float(x.max()):g}; put the "
            "normalisation inside the model"
        )
    if y.shape != x.shape[:1] or y.is_floating_point():
        raise UsageError(f"y must hold one integer label an image, shape ({len(x)},), got {tuple(y.shape)} {y.dtype}")
    if health not in TIERS:
        raise UsageError(f"unknown health {health!r}; expected one of {', '.join(TIERS)}")
    name, bracketed = parse_call(attack)
    spec = AttackSpec.create(
        name,
        {"success": success, **bracketed, **params},
        norm,
        eps,
        dimensions=x[0].numel(),
        search=search,
        combiner=combiner,
        seed=attack_seed,
    )
    where = resolve_device(device)
    batch_size = batch_size or choose_batch_size(model, x.float(), where)
    outcome = attack_model(
        model,
        x.float(),
        y.long(),
        spec,
        batch_size=batch_size,
        device=where,
        prerequisites=prerequisites,
        health=health,
        progress=progress,
    )
    pixels = hashlib.sha256(x.detach().cpu().contiguous().numpy().tobytes() + y.cpu().numpy().tobytes()).hexdigest()
    blank = Record(
        key=cell_key(
            weights_hash(model),
            spec,
            pixels[:16],
            {role: weights_hash(needed) for role, needed in (prerequisites or {}).items()},
        ),
        dataset="custom",
        train_seed=None,
        training=_training_of(model),
        n=len(x),
        **_model_fields(model),
        **attack_fields(spec),
    )
    source = provenance(
        where,
        protocol=None,
        attack_seed=attack_seed,
        batch_size=batch_size,
        search=search,
        subset_checksum=pixels[:16],
        health=health,
    )
    return fill_in(dataclasses.replace(blank, provenance=source), outcome, list(range(len(x))))


def evaluate_cell(
    defense: EnsembleDefense,
    cell: Cell,
    test: Split,
    ids: Tensor,
    *,
    device: str,
    batch_size: int,
    checkpoint: str,
    protocol: str | None,
    prerequisites: Mapping[str, EnsembleDefense] | None = None,
    sets: AdversarialSets | None = None,
    evidence: EvidenceFolder | None = None,
    trained_with: Sequence[Mapping[str, Any]] = (),
    trained_on: Mapping[str, Any] | None = None,
    health: Tier = "basic",
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> Record:
    """The record of one cell.

    Args:
        test, ids: its images, and their positions in the whole test set.
        sets: where adversarial images crafted on surrogates are kept.
        evidence: where the adversarial examples found here are kept; None: they are not.
        trained_with: findings about the training, which become flags of the record, before those about the attack.
        trained_on: what provenance tells of the training: its devices, what it took.
        health: tier of the report on the attack.
        journal: keeps the state of the attack until the record is there.
    """
    outcome = attack_model(
        defense,
        test.x(),
        test.labels,
        cell.attack,
        ids=ids,
        batch_size=batch_size,
        device=device,
        prerequisites=prerequisites,
        sets=sets,
        health=health,
        journal=journal,
        progress=progress,
    )
    record = blank_record(cell, protocol, checkpoint=checkpoint)
    source = {
        **provenance(device),
        **record.provenance,
        **(trained_on or {}),
        "batch_size": batch_size,
        "health": health,
    }
    found = fill_in(dataclasses.replace(record, provenance=source), outcome, ids.tolist())
    kept = refused("not asked for (--evidence none)")
    if evidence is not None:
        kept = evidence.keep(
            found, defense, cell.attack, test.x(), test.labels, outcome, batch_size=batch_size, device=device
        )
    return dataclasses.replace(found, flags=[*map(dict, trained_with), *found.flags], evidence=kept)


def fill_in(record: Record, outcome: Outcome, ids: list[int]) -> Record:
    """The record with what the attack found."""
    counted = with_outcomes(record, ids, outcome.clean.int().tolist(), outcome.robust.int().tolist())
    return dataclasses.replace(
        counted,
        seconds=round(outcome.seconds, 3),
        forwards=outcome.forwards / len(ids),
        backwards=outcome.backwards / len(ids),
        broken_by=outcome.broken_by,
        flags=_flags(outcome, len(ids)),
    )


def resolve_device(device: str) -> str:
    """``"auto"`` -> ``"cuda"`` where there is one.

    Raises:
        UsageError: another name, or CUDA asked for and not there.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {device!r}; expected auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device is cuda, but PyTorch sees no CUDA device; use --device cpu")
    return device


def _model_fields(model: nn.Module) -> dict[str, Any]:
    if isinstance(model, EnsembleDefense):
        spec = model.spec
        name = spec.method if spec else type(model).__name__
        return {
            "method": name,
            "hyper": dict(spec.hyper) if spec else {},
            "label": spec.method_call if spec else name,
            "architecture": spec.architecture_call if spec else "custom",
            "members": len(model.members),
        }
    name = type(model).__name__
    return {"method": name, "hyper": {}, "label": name, "architecture": "custom", "members": 1}


def _training_of(model: nn.Module) -> dict[str, Any]:
    """What a record tells of a training that this project did not do, or does not know."""
    imported = model.imported if isinstance(model, EnsembleDefense) else None
    return {} if imported is None else {"imported": dict(imported)}


def _flags(outcome: Outcome, n: int) -> list[dict[str, Any]]:
    counted = {"recount": outcome.unconfirmed, "nonfinite": outcome.nonfinite}
    return [finding(name, count / n) for name, count in counted.items() if count] + outcome.findings
