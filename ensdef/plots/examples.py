"""Adversarial examples of one record: its attack is run again on some of its images. The one figure that needs torch.

Records keep verdicts, not images. The random numbers of an attack are keyed by image, so that a few images see what
they saw among all; the caption tells if a verdict differs from the record's nevertheless (wrapped attacks draw for
whole batches).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ensdef.bounded import safe_name
from ensdef.errors import CheckpointError, UsageError
from ensdef.plots.choice import Choice
from ensdef.plots.kinds import KINDS
from ensdef.plots.style import caption, new_figure, styled
from ensdef.plots.surface import show_picture
from ensdef.records import Record, read_record

#: Inches of a picture.
PANEL = 1.5


@dataclass(frozen=True)
class Examples:
    """Images before and after the attack.

    Args:
        ids: positions in the test set, (N,).
        clean, attacked: (N, C, H, W) in [0, 1].
        labels, before, after: true classes and answers on clean and on attacked images, (N,).
        classes: names of the classes.
        unlike: number of images whose verdict is not the record's.
    """

    ids: list[int]
    clean: np.ndarray[Any, Any]
    attacked: np.ndarray[Any, Any]
    labels: list[int]
    before: list[int]
    after: list[int]
    classes: tuple[str, ...]
    unlike: int


def draw(results: Path, choice: Choice) -> Figure:
    """Rows: images. Columns: clean, attacked, and the difference as large as it can be shown."""
    record = _the_one(results, choice)
    if choice.images < 1:
        raise UsageError(f"--images is {choice.images}; expected at least 1")
    found = _of_kind(record, choice.which)
    if not 0 <= choice.image < len(found):
        raise UsageError(
            f"--image is {choice.image}, and the record has {len(found)} images that are {choice.which}, from 0; "
            "choose others with --which all, fooled or robust"
        )
    return figure_of(record, attacked_again(record, results, found[choice.image : choice.image + choice.images]))


def _of_kind(record: Record, which: str) -> list[int]:
    """Positions in the record's outcomes of the images that are fooled, robust, or all."""
    wanted = {"fooled": {(1, 0)}, "robust": {(1, 1)}, "all": {(0, 0), (1, 0), (1, 1)}}[which]
    verdicts = zip(record.outcomes.get("clean", []), record.outcomes.get("robust", []), strict=True)
    return [position for position, verdict in enumerate(verdicts) if verdict in wanted]


def _the_one(results: Path, choice: Choice) -> Record:
    if choice.record is not None:
        try:
            return read_record(choice.record)
        except UsageError as error:
            raise UsageError(f"--record {error}") from error
    found = choice.records(results, KINDS["examples"].command)
    if len(found) > 1:
        shown = ", ".join(str(record.path) for record in found[:3])
        raise UsageError(
            f"there are {len(found)} records, and the figure shows one ({shown}{', ...' if len(found) > 3 else ''}); "
            "name it with --record, or choose with --method, --attack, --norm, --eps or --seed"
        )
    return found[0]


def attacked_again(record: Record, results: Path, positions: Sequence[int]) -> Examples:
    """Run a record's attack on the images at these positions in its outcomes, on the CPU.

    Raises:
        UsageError: the record has an error, or its attack needs surrogates.
        CheckpointError: the weights are not there.
        DataError: the images are not what they were.
    """
    import torch

    from ensdef.attack_spec import AttackSpec
    from ensdef.checkpoints import data_spec, load_checkpoint
    from ensdef.harness import attack_model
    from ensdef.loading import reload_data
    from ensdef.recombined import recombined
    from ensdef.registry import ATTACKS

    if record.error is not None:
        raise UsageError(f"{record.path}: the cell failed ({record.error}), so there are no images to show")
    folder = _checkpoint(record, results)
    spec = AttackSpec.create(
        record.attack,
        {**record.attack_params, "success": record.success},
        record.norm or "linf",
        record.eps or "0",
        search=str(record.provenance.get("search") or "fp32"),
        combiner=record.combiner,
        seed=int(record.provenance.get("attack_seed") or 0),
    )
    if ATTACKS.get(spec.name).access == "transfer":
        raise UsageError(
            f"{record.attack_label} crafts on other networks; give the record of an attack on the defence itself"
        )
    defense, data = load_checkpoint(folder), reload_data(data_spec(folder))
    ids = torch.tensor([record.outcomes["ids"][position] for position in positions])
    test = data.test.select(ids)
    outcome = attack_model(defense, test.x(), test.labels, spec, ids=ids, health="off")
    model = recombined(defense, spec.combiner)
    with torch.no_grad():
        before, after = (model(x).argmax(dim=1).tolist() for x in (test.x(), outcome.x_adv))
    told = [record.outcomes["robust"][position] for position in positions]
    unlike = sum(verdict != other for verdict, other in zip(outcome.robust.int().tolist(), told, strict=True))
    return Examples(
        ids.tolist(),
        test.x().numpy(),
        outcome.x_adv.cpu().numpy(),
        test.labels.tolist(),
        before,
        after,
        data.classes,
        unlike,
    )


def _checkpoint(record: Record, results: Path) -> Path:
    """The checkpoint's folder: of the name that the record tells, in ``results`` or beside the record."""
    if record.checkpoint is None:
        raise CheckpointError(f"{record.path} names no checkpoint: it is of a model that was not trained here")
    # the name alone: what a file says must not lead to any folder of the machine
    name = safe_name(Path(record.checkpoint).name, "the checkpoint")
    beside = Path(str(record.path)).resolve().parents
    for folder in (results, *(parent.parent for parent in beside[:3] if parent.name == "records")):
        if (folder / "checkpoints" / name).is_dir():
            return folder / "checkpoints" / name
    raise CheckpointError(
        f"the checkpoint {name} of {record.path} is not in {results / 'checkpoints'}; run what made the record again, "
        "or name the results folder that has it with --results"
    )


def figure_of(record: Record, shown: Examples) -> Figure:
    """The pictures with what is answered, one image a row."""
    count = len(shown.ids)
    difference = shown.attacked - shown.clean
    largest = float(np.abs(difference).max()) or 1.0
    with styled():
        figure = new_figure(3 * PANEL + 0.6, count * (PANEL + 0.25) + 0.5)
        axes = figure.subplots(count, 3, squeeze=False)
        for row, (clean, attacked, difference_) in enumerate(axes):
            show_picture(clean, shown.clean[row])
            show_picture(attacked, shown.attacked[row])
            show_picture(difference_, 0.5 + difference[row] / (2 * largest))
            clean.set_ylabel(f"image {shown.ids[row]}", fontsize=8)
            label, *answers = (shown.classes[part[row]] for part in (shown.labels, shown.before, shown.after))
            for axis, answer in zip((clean, attacked), answers, strict=True):
                axis.set_xlabel(_answer(answer, label), fontsize=8)
        for axis, title in zip(axes[0], ("clean", "attacked", f"difference x {0.5 / largest:.3g}"), strict=True):
            axis.set_title(title, loc="left", fontsize=9)
        radius = f", {record.norm} {record.eps}" if record.norm else ""
        unlike = f" On {shown.unlike} of them the attack ended otherwise than in the record." if shown.unlike else ""
        caption(
            figure,
            f"{record.label} on {record.dataset}, seed {record.train_seed}, under {record.attack_label}{radius}; n = "
            f"{count} of {record.n} test images.{unlike}",
        )
    return figure


def _answer(answer: str, label: str) -> str:
    return f"answers {answer} (right)" if answer == label else f"answers {answer} (is {label})"
