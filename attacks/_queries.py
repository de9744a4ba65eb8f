"""What query attacks share: keeping the best of many proposals, and the blocks that sign attacks flip."""

from __future__ import annotations

from abc import abstractmethod
from functools import lru_cache

import torch
from torch import Tensor

from ensdef.attack import IterativeAttack, State
from ensdef.errors import UsageError
from ensdef.losses import margin
from ensdef.rng import KeyedRandom
from ensdef.target import Target, Traits
from ensdef.threat import Threat


class ProposalAttack(IterativeAttack):
    """Search by proposals: every step asks about one point and keeps it where the loss has risen.

    ``queries`` counts every question: the first is about the starting point. The last step returns the best point.
    The state holds the clean image ``x``, the ``best`` point and ``best_loss``; subclasses add to it in ``start``.
    """

    access = "score"

    @property
    def steps(self) -> int:
        return int(self.params.queries)

    def start(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> State:
        return {"x": x, "best": x, "best_loss": x.new_full((len(x),), -torch.inf)}

    def step(
        self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
    ) -> tuple[Tensor, State]:
        loss = self.loss(target(x_adv), y)
        better = loss > state["best_loss"]
        best = torch.where(spread(better, x_adv), x_adv, state["best"])
        state = {**state, "best": best, "best_loss": torch.where(better, loss, state["best_loss"])}
        proposal, state = self.propose(better, state, threat, rng)
        over = rng.step >= self.steps
        if "done" in state:
            over = over | state["done"]
        return torch.where(spread(over, best), best, proposal), state

    def loss(self, scores: Tensor, y: Tensor) -> Tensor:
        """What is raised, (B,): the best wrong score minus the true one."""
        return margin(scores, y)

    @abstractmethod
    def propose(self, better: Tensor, state: State, threat: Threat, rng: KeyedRandom) -> tuple[Tensor, State]:
        """The next point to ask about, (B, ...).

        Args:
            better: whether the point just asked about was kept, (B,); it is ``state["best"]`` then.
        """


def spread(values: Tensor, x: Tensor) -> Tensor:
    """One value an image, (B,), with the trailing dimensions of ``x``, (B, 1, ..., 1)."""
    return values.view(-1, *[1] * (x.dim() - 1))


def log_odds(scores: Tensor, y: Tensor) -> Tensor:
    """log((1 - p_y) / p_y) of p = softmax(scores), (B,).

    It rises whenever log p_y falls, also where p_y has been rounded to 1 (margins above 17 in float32). Computed in
    float64: exp and log of float32 round differently at the end of a batch than inside it.
    """
    wide = scores.double()
    true = wide.gather(1, y[:, None]).squeeze(1)
    return (wide.scatter(1, y[:, None], -torch.inf).logsumexp(dim=1) - true).to(scores.dtype)


@lru_cache(maxsize=8)
def blocks(dimensions: int, device: torch.device) -> Tensor:
    """First coordinate and end of the blocks that sign attacks flip, (N, 2), int64.

    The whole, then its halves, its quarters, ..., at last the single coordinates: block i of level h is coordinates
    i * size to (i + 1) * size of the flattened image, with size = dimensions / 2^h rounded up.
    """
    bounds = []
    for level in range((dimensions - 1).bit_length() + 1):
        size = -(-dimensions // 2**level)
        first = torch.arange(0, dimensions, size, device=device)
        bounds.append(torch.stack([first, (first + size).clamp(max=dimensions)], dim=1))
    return torch.cat(bounds)


def flip(signs: Tensor, block: Tensor, position: Tensor) -> Tensor:
    """``signs`` (B, ...) with one block an image, (B, 2), turned round.

    Args:
        position: place of every coordinate in the flattened image, of the shape of one image.
    """
    inside = (position >= spread(block[:, 0], signs)) & (position < spread(block[:, 1], signs))
    return torch.where(inside, -signs, signs)


def require_planes(what: str, traits: Traits) -> None:
    """Refuse images that are not made of channels of rows and columns.

    Raises:
        UsageError: see above.
    """
    if len(traits.image_shape) != 3:
        raise UsageError(f"{what} need images of shape (channels, height, width); these are {traits.image_shape}")


def positive(**values: float) -> None:
    """Refuse parameters that are not above 0.

    Raises:
        UsageError: naming the parameter.
    """
    for name, value in values.items():
        if not value > 0:
            raise UsageError(f"{name} is {value}; expected a number above 0")
