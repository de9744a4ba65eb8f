"""From what was measured to the file that keeps it, and back."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from ensdef.checkpoints import checkpoint_folder, training_report
from ensdef.jobs import Run, is_trained
from ensdef.measure import Measured
from ensdef.measure_spec import MeasureSpec
from ensdef.measurement import Measurement, Measurements, tidy
from ensdef.provenance import provenance
from ensdef.record_cell import training_fields


def measurement_path(spec: MeasureSpec, run: Run) -> Path:
    """Where a measurement lives."""
    blank = blank_measurement(spec, run)
    return Measurements(run.results).path(blank.dataset, blank.method, spec.name, spec.key)


def find_measurement(spec: MeasureSpec, run: Run) -> Measurement | None:
    """The stored measurement, if there is one.

    Raises:
        UsageError: it was edited since.
    """
    found = Measurements(run.results).read(measurement_path(spec, run), spec.key)
    # the same radius may have been written in another way when it was measured
    return None if found is None else dataclasses.replace(found, eps=spec.written)


def blank_measurement(spec: MeasureSpec, run: Run) -> Measurement:
    """What is known of a measurement before it is made."""
    trained: dict[str, Any] = dict.fromkeys(
        ("method", "label", "dataset", "architecture", "members", "train_seed", "checkpoint")
    )
    hyper, training = {}, {}
    if spec.training is not None:
        model, setting = spec.training.model, spec.training.setting
        hyper, training = dict(model.hyper), training_fields(spec.training)
        trained = {
            "method": model.method,
            "label": model.method_call,
            "dataset": setting.data.name,
            "architecture": model.architecture_call,
            "members": model.members,
            "train_seed": setting.seed,
            "checkpoint": str(checkpoint_folder(run.results, spec.training)),
        }
    return Measurement(
        key=spec.key,
        name=spec.name,
        params=dict(spec.params),
        call=spec.call,
        hyper=hyper,
        training=training,
        norm=spec.norm,
        eps=spec.written,
        eps_value=spec.eps_value,
        combiner=spec.combiner,
        seed=spec.seed,
        **trained,
    )


def filled(blank: Measurement, measured: Measured, images: int | None) -> Measurement:
    return dataclasses.replace(
        blank,
        n=images if measured.n is None else measured.n,
        values={name: float(value) if math.isfinite(value) else None for name, value in measured.values.items()},
        stderr={name: float(value) for name, value in measured.stderr.items() if math.isfinite(value)},
        series={name: tidy(value) for name, value in measured.series.items()},
    )


def measurement_provenance(spec: MeasureSpec, run: Run) -> dict[str, Any]:
    told = provenance(run.device, protocol=run.protocol, subset_checksum=spec.subset_checksum)
    if spec.training is None:
        return told
    folder = checkpoint_folder(run.results, spec.training)
    report = training_report(folder) if is_trained(spec.training, run.results) else {}
    trained_on: dict[str, Any] = {name: report[name] for name in ("devices", "batch_norm") if name in report}
    return {**told, "train_seed": spec.training.setting.seed, **trained_on}
