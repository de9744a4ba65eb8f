"""What a record rests on, kept beside it: one adversarial point an image, and hashes of all that belongs to it.

``evidence/<data set>/<method>/<attack>-<key>-<checksum>.safetensors`` holds, for every image that was right, the point
the attack offered last, as small as its verdict allows (:mod:`ensdef.points`). After rounding every verdict is passed
again, by a fresh pass of the true model at another batch size. ``ensdef verify`` recounts the record from it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ensdef._version import __version__
from ensdef.attack_spec import AttackSpec
from ensdef.codehash import code_hash
from ensdef.harness import Outcome, exact_arithmetic
from ensdef.judging import is_borderline, is_right, scores_of
from ensdef.points import outside, packed_points, portions, rounded, stepped
from ensdef.records import Record, write_bytes
from ensdef.registry import ATTACKS, METHODS
from ensdef.rows import SMALLEST_BATCH
from ensdef.target import Target
from ensdef.threat import Threat
from ensdef.weights import weights_hash

#: Whether cells keep their adversarial examples.
Keep = Literal["all", "none"]
#: Images of a cell beyond which none are kept.
LIMIT = 1000
_FOLDER = "evidence"


def evidence_path(record: Record, checksum: str) -> PurePosixPath:
    """Where the evidence of a record lies in its results folder.

    The name has its checksum: of two processes that come to one cell neither can take the other's evidence away.
    """
    name = f"{record.attack}-{record.key[:16]}-{checksum[:16]}.safetensors"
    return PurePosixPath(_FOLDER, record.dataset, record.method, name)


def images_hash(x: Tensor) -> str:
    """SHA-256 of shape and values of images, (N, ...), float32."""
    return _hash(x.float())


def labels_hash(y: Tensor) -> str:
    """SHA-256 of labels, (N,), int64."""
    return _hash(y.long())


def _hash(values: Tensor) -> str:
    digest = hashlib.sha256(str(tuple(values.shape)).encode())
    digest.update(values.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def code_hashes(record: Record) -> dict[str, str]:
    """Of the sources of defence and attack, as they are now."""
    return {"method": code_hash(METHODS.get(record.method)), "attack": code_hash(ATTACKS.get(record.attack))}


def refused(reason: str) -> dict[str, Any]:
    """What a record says in the place of evidence."""
    return {"none": reason}


@dataclass(frozen=True)
class EvidenceFolder:
    """Keeps evidence in a results folder."""

    results: Path

    def keep(
        self,
        record: Record,
        model: nn.Module,
        spec: AttackSpec,
        x: Tensor,
        y: Tensor,
        outcome: Outcome,
        *,
        batch_size: int,
        device: str,
    ) -> dict[str, Any]:
        """Write the points of a finished record; returns its field ``evidence``.

        Args:
            record: with key and outcomes.
            model: the defence that was attacked.
            x, y: clean images (N, ...) in [0, 1] and labels (N,), in the order of the outcomes.
            batch_size: the attack's, which is not the one verdicts are passed at here.
        """
        if len(x) > LIMIT:
            return refused(f"{len(x)} images; evidence is kept up to {LIMIT}")
        threat = Threat(spec.norm, spec.eps_value or 0.0)
        rows = outcome.clean.nonzero().squeeze(1)
        batch = max(batch_size // 3, SMALLEST_BATCH) + 5
        found = _Found(model, spec, threat, x[rows], y[rows], outcome.robust[rows], batch, torch.device(device))
        steps, points, exact, lost = found.smallest(outcome.x_adv[rows])
        ids = torch.tensor(record.outcomes["ids"])[rows]
        if lost.any():
            shown = ", ".join(map(str, ids[lost][:5].tolist()))
            return refused(
                f"a fresh pass gives {int(lost.sum())} of the points another verdict than the record (images {shown}); "
                "answers that are drawn at random have no evidence"
            )
        content = packed_points(ids, steps, points, exact, record.key)
        checksum = hashlib.sha256(content).hexdigest()
        path = evidence_path(record, checksum)
        write_bytes(self.results / path, content)
        return {
            "file": str(path),
            "sha256": checksum,
            "inputs": images_hash(x),
            "labels": labels_hash(y),
            "weights": weights_hash(model),
            "code": code_hashes(record),
            "version": __version__,
        }


class _Found:
    """What an attack left of the images that were right, to be kept with the verdicts it has.

    Args:
        x, y, robust: clean images (N, ...), labels (N,) and verdicts (N,).
    """

    def __init__(
        self,
        model: nn.Module,
        spec: AttackSpec,
        threat: Threat,
        x: Tensor,
        y: Tensor,
        robust: Tensor,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.judge = Target(model, combiner=spec.combiner, fold=False, device=device)
        self.threat = threat
        self.x, self.y, self.robust = x, y, robust
        self.batch_size = batch_size
        self.device = device

    def smallest(self, x_adv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Steps and points for all images, (N, ...), which of them must stay exact, and which verdicts are lost."""
        if not len(x_adv):
            none = torch.zeros(0, dtype=torch.bool)
            return x_adv.to(torch.int16), x_adv, none, none
        steps = rounded(self.x, x_adv, self.threat)
        small = stepped(self.x, steps)
        right, borderline = self._verdicts(small)
        exact = (right != self.robust) | borderline | self._strays(small)
        points = x_adv.clone()
        far = self._strays(points)  # float32 lengths of large images may be off by more than the slack
        points[far] = self.threat.project(points[far].double(), self.x[far].double()).float()
        lost = torch.zeros_like(exact)
        if exact.any():
            right, borderline = self._verdicts(points[exact], exact)
            lost[exact] = (right != self.robust[exact]) & ~borderline
        return steps, points, exact, lost

    def _verdicts(self, points: Tensor, rows: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        y = self.y[rows].to(self.device)
        with exact_arithmetic(self.device):
            scores = scores_of(self.judge, points.to(self.device), self.batch_size, check=False)
        return is_right(scores, y).cpu(), is_borderline(scores, y).cpu()

    def _strays(self, points: Tensor) -> Tensor:
        parts = [outside(a.double(), b, self.threat) for a, b in portions(points, self.x)]
        return torch.cat([torch.stack(list(part.values())).any(dim=0) for part in parts])
