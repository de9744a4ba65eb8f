"""The report's own small attacks: plain loops over a few images, judged at every point on ``predict``.

They are not what a table reports; they only tell whether what it reports can be believed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ensdef.losses import margin, targeted_margin
from ensdef.target import Target
from ensdef.threat import Threat

#: Scores (B, C) and labels (B,) -> what is raised, (B,).
Loss = Callable[[Tensor, Tensor], Tensor]
#: The step at which an image fell that never fell.
NEVER = 1 << 30


def wrong(scores: Tensor, y: Tensor) -> Tensor:
    """Whether scores choose another class than the label, or are no numbers, (B,) bool."""
    return (scores.argmax(dim=1) != y) | ~torch.isfinite(scores).all(dim=1)


def climb(
    target: Target,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    loss: Loss,
    *,
    steps: int,
    step_size: float,
    start: Tensor | None = None,
    view: str = "predict",
    goal: Tensor | None = None,
    batch_size: int = 128,
) -> Tensor:
    """Projected gradient ascent.

    Args:
        x, y: images (n, ...) and labels, (n,).
        step_size: in image units.
        start: points to begin at, (n, ...); None: the images themselves.
        view: the reading whose loss is raised.
        goal: wrong classes, (n,), whose score minus the true one's is raised instead.
    Returns:
        number of steps after which each image was first misclassified, NEVER for those that were not, (n,) int64.
    """
    first = torch.full((len(x),), NEVER, dtype=torch.int64, device=x.device)
    origin = x if start is None else start
    for rows in torch.arange(len(x), device=x.device).split(batch_size):
        alive, point = rows, origin[rows]
        for step in range(steps + 1):
            point = point.detach().requires_grad_()
            scores = target.views[view](point)
            if view == "predict":
                decided = scores.detach()
            else:
                with torch.no_grad():
                    decided = target(point.detach())
            fallen = wrong(decided, y[alive])
            first[alive[fallen]] = step
            if step < steps and not bool(fallen.all()) and scores.requires_grad:
                raised = loss(scores, y[alive]) if goal is None else targeted_margin(scores, y[alive], goal[alive])
                gradient = torch.autograd.grad(raised.sum(), point)[0]
                gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
                moved = threat.project(point.detach() + step_size * threat.ascent(gradient), x[alive])
                alive, point = alive[~fallen], moved[~fallen]
            target.forget()
            if step == steps or bool(fallen.all()) or not scores.requires_grad:
                break
    return first


def draw(
    target: Target,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: torch.Generator,
    *,
    draws: int,
    batch_size: int = 128,
) -> Tensor:
    """Random points, every other one on the edge of the ball; whether one fools each image, (n,) bool."""
    fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for number in range(draws):
        for rows in (~fooled).nonzero().squeeze(1).split(batch_size):
            noise = _noise(x[rows], threat, rng, edge=number % 2 == 1)
            fooled[rows] = wrong(_ask(target, threat.project(x[rows] + noise, x[rows])), y[rows])
    return fooled


def search(
    target: Target,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: torch.Generator,
    *,
    queries: int,
    batch_size: int = 128,
) -> Tensor:
    """Random local search on the margin, by scores alone; whether it fools each image, (n,) bool.

    Begins at a random point on the edge of the ball. A proposal draws part of the coordinates anew, fewer as the
    queries run out, and stays if the margin did not fall.
    """
    fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for rows in torch.arange(len(x), device=x.device).split(batch_size):
        alive = rows
        best = threat.project(x[alive] + _noise(x[alive], threat, rng, edge=True), x[alive])
        value = torch.full((len(alive),), -torch.inf, dtype=x.dtype, device=x.device)
        proposal = best
        for query in range(queries):
            scores = _ask(target, proposal)
            reached = margin(scores, y[alive]).to(value.dtype)
            better = reached >= value
            better_shape = better.view(-1, *[1] * (x.dim() - 1))
            best, value = torch.where(better_shape, proposal, best), torch.where(better, reached, value)
            fallen = wrong(scores, y[alive])
            fooled[alive[fallen]] = True
            alive, best, value = alive[~fallen], best[~fallen], value[~fallen]
            if not len(alive):
                break
            part = max(0.5 * (1 - query / queries), 1.5 / x[0].numel())
            fresh = torch.rand(best.shape, generator=rng, device=x.device) < part
            other = threat.project(x[alive] + _noise(x[alive], threat, rng, edge=True), x[alive])
            proposal = threat.project(torch.where(fresh, other, best), x[alive])
    return fooled


def _noise(x: Tensor, threat: Threat, rng: torch.Generator, *, edge: bool) -> Tensor:
    """linf: uniform in the ball, or in its corners; l2: a Gaussian direction inside the ball, or on its surface."""
    if threat.norm == "linf":
        noise = torch.rand(x.shape, generator=rng, device=x.device) * 2 - 1
        return threat.eps * (noise.sign() if edge else noise)
    direction = threat.ascent(torch.randn(x.shape, generator=rng, device=x.device))
    if edge:
        return threat.eps * direction
    length = torch.rand(len(x), generator=rng, device=x.device).view(-1, *[1] * (x.dim() - 1))
    return threat.eps * length * direction


def _ask(target: Target, x: Tensor) -> Tensor:
    with torch.no_grad():
        scores: Tensor = target(x).detach()
    target.forget()
    return scores
