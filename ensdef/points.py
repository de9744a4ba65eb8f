"""Adversarial points as a file holds them: small, and exactly what was judged.

A point is the clean image plus whole steps of 1/255, one byte a value (two where a step is larger than 127), wherever
its verdict survives that; else it is kept in float32 as it is. Rounding goes to the nearest step, towards the clean
image where the nearest leaves the ball or the box.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ensdef.keys import canonical
from ensdef.session import BALL_SLACK
from ensdef.threat import Threat

#: Steps of a rounded difference in one pixel value.
LEVELS = 255
#: Images that are worked on at once, so that large ones fit into memory.
PORTION = 100
_FORMAT = 1
_HEADER = "points"
#: The tensors of a file: differences in steps of two widths, and points; each has the ids of its images beside it.
_STEPS = {"delta_int8": torch.int8, "delta_int16": torch.int16}
_EXACT = {"point_float32": torch.float32}
_KINDS = {**_STEPS, **_EXACT}


class DamagedPoints(ValueError):
    """A file of points that is not as it was written; the message says in what."""


def rounded(x: Tensor, x_adv: Tensor, threat: Threat) -> Tensor:
    """Whole steps from ``x`` to the neighbourhood of ``x_adv``, int16, (N, ...), inside ball and box."""
    return torch.cat([_rounded(a.double(), b.double(), threat) for a, b in portions(x, x_adv)])


def _rounded(x: Tensor, x_adv: Tensor, threat: Threat) -> Tensor:
    delta = (x_adv - x) * LEVELS
    steps = delta.round()
    if threat.norm == "linf":
        limit = int(LEVELS * (threat.eps + BALL_SLACK))
        steps = steps.clamp(-limit, limit)
    elif threat.norm == "l2":
        # rounding adds length that is none of the attack's: of a vector shortened by as much there is room for it
        length = steps.flatten(1).norm(dim=1).clamp_min(1.0) / LEVELS
        shape = (-1, *[1] * (x.dim() - 1))
        steps = (delta * (threat.eps / length).clamp(max=1.0).square().view(shape)).round()
    reached = x + steps / LEVELS
    steps = steps - (reached > 1.0 + BALL_SLACK).double() + (reached < -BALL_SLACK).double()
    return steps.to(torch.int16)


def stepped(x: Tensor, steps: Tensor) -> Tensor:
    """The points that steps from clean images lead to, as they are judged, (N, ...)."""
    return torch.cat([judged(_stepped(a, b)) for a, b in portions(x, steps)])


def _stepped(x: Tensor, steps: Tensor) -> Tensor:
    return x.double() + steps.double() / LEVELS


def judged(points: Tensor) -> Tensor:
    """Stored points as a model sees them: float32, without what rounding left outside the box."""
    return points.clamp(0.0, 1.0).float()


def packed_points(ids: Tensor, steps: Tensor, points: Tensor, exact: Tensor, key: str) -> bytes:
    """A safetensors file of points.

    Args:
        ids: of the images, (N,).
        steps: int16, (N, ...), for images that are not ``exact``, (N,) bool.
        points: float32, (N, ...), for those that are.
        key: of the cell, written beside them.
    """
    wide = steps.flatten(1).abs().amax(dim=1) > torch.iinfo(torch.int8).max
    parts = {"delta_int8": (~exact & ~wide, steps), "delta_int16": (~exact & wide, steps)}
    tensors = {}
    for name, (rows, values) in {**parts, "point_float32": (exact, points)}.items():
        tensors[name] = values[rows].to(_KINDS[name]).contiguous()
        tensors[f"{name}_ids"] = ids[rows].clone()
    # as one entry: several would stand in another order each time, and equal points would give unequal files
    return save(tensors, metadata={_HEADER: canonical({"format": _FORMAT, "key": key, "levels": LEVELS})})


@dataclass(frozen=True)
class StoredPoints:
    """The points of a file.

    Args:
        key: of the cell they were found in.
        tensors: steps and points with the ids of their images.
    """

    key: str
    tensors: Mapping[str, Tensor]

    @classmethod
    def unpack(cls, content: bytes, shape: tuple[int, ...]) -> StoredPoints:
        """Inverse of :func:`packed_points`.

        Args:
            shape: of one image.
        Raises:
            DamagedPoints: truncated, no such file, tensors of other types or shapes, or an image that is there twice.
        """
        try:
            tensors = load(content)
            length = int.from_bytes(content[:8], "little")
            told = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][_HEADER])
            form = (told["format"], told["levels"])
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DamagedPoints(f"is truncated or no file of points ({error!r})") from error
        if form != (_FORMAT, LEVELS):
            raise DamagedPoints(f"is of another format: {told}")
        expected = {*_KINDS, *(f"{name}_ids" for name in _KINDS)}
        if set(tensors) != expected:
            raise DamagedPoints(f"holds {', '.join(sorted(tensors))}; expected {', '.join(sorted(expected))}")
        for name, kind in _KINDS.items():
            values, ids = tensors[name], tensors[f"{name}_ids"]
            if values.dtype != kind or values.dim() != 1 + len(shape) or values.shape[1:] != shape:
                came = f"{values.dtype} {tuple(values.shape)}"
                raise DamagedPoints(f"has {name} of {came}; expected {kind} (n, {', '.join(map(str, shape))})")
            if ids.dtype != torch.int64 or ids.shape != values.shape[:1]:
                came = f"{ids.dtype} {tuple(ids.shape)}"
                raise DamagedPoints(f"has {name}_ids of {came}; expected torch.int64 ({len(values)},)")
        points = cls(str(told.get("key")), tensors)
        if len(set(points.ids)) != len(points.ids):
            twice = sorted({one for one in points.ids if points.ids.count(one) > 1})
            raise DamagedPoints(f"has points of image {', '.join(map(str, twice[:5]))} twice")
        return points

    @property
    def ids(self) -> list[int]:
        """Of the images that have a point, in the order of the file."""
        return [one for name in _KINDS for one in self.tensors[f"{name}_ids"].tolist()]

    @property
    def exact(self) -> int:
        """How many points are kept in float32."""
        return len(self.tensors["point_float32"])

    def at(self, ids: list[int], x: Tensor) -> Tensor:
        """The points of some images, float64, (B, ...), as stored: nothing is clamped.

        Args:
            ids: of images that all have a point, (B,).
            x: their clean images, (B, ...).
        """
        found = torch.empty(x.shape, dtype=torch.float64)
        row = {one: position for position, one in enumerate(ids)}
        for name in _KINDS:
            held = self.tensors[f"{name}_ids"].tolist()
            pairs = [(row[one], position) for position, one in enumerate(held) if one in row]
            if pairs:
                here, there = torch.tensor(pairs).unbind(1)
                values = self.tensors[name][there]
                found[here] = values.double() if name in _EXACT else _stepped(x[here], values)
        return found


def outside(points: Tensor, x: Tensor, threat: Threat) -> dict[str, Tensor]:
    """What is wrong with where points lie: reasons, and the rows each is true of, (B,) bool.

    Args:
        points: float64, (B, ...).
        x: clean images, (B, ...).
    """
    flat = points.flatten(1)
    finite = torch.isfinite(flat).all(dim=1)
    inside = (flat >= -BALL_SLACK).all(dim=1) & (flat <= 1.0 + BALL_SLACK).all(dim=1)
    near = threat.distance(judged(points), x) <= threat.eps + BALL_SLACK
    return {"not finite": ~finite, "outside the box [0, 1]": finite & ~inside, "outside the ball": finite & ~near}


def portions(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Tensors with one leading dimension, cut alike into pieces that fit into memory."""
    return list(zip(*(one.split(PORTION) for one in tensors), strict=True))
