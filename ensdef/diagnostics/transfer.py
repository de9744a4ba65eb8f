"""How adversarial images carry over between the members of an ensemble.

CCE: Improving Ensemble Robustness by Collaboratively Promoting and Demoting Adversarial Robustness (Bui et al., AAAI
2021, arXiv:2009.09612), Table 6. DVERGE: Diversifying Vulnerabilities for Enhanced Robust Generation of Ensembles (Yang
et al., NeurIPS 2020, arXiv:2009.14720), the transferability and diversity matrices of its released evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ensdef.defense import EnsembleDefense
from ensdef.diagnostics.answers import answer, right
from ensdef.diagnostics.crafting import distill, network_of
from ensdef.errors import UsageError
from ensdef.losses import member_cross_entropy


@dataclass(frozen=True)
class Transferability:
    """CCE's transferability of K members, all fractions in [0, 1].

    The paper defines its quantities for two members; there the numbers below are the paper's. For more, ``T``, ``nT``
    and ``a_single`` are averages over the ordered pairs of members (ours).

    Args:
        accuracy: a^(i,j), (K+1, K+1): accuracy of j on images crafted on i; the last row and column are the ensemble.
        both: S11, (K, K), share of the images crafted on the ensemble that members i and j both get right.
        only: S10, (K, K), share that i gets right and j wrong; S01 of a pair is the transposed entry.
        neither: S00, (K, K), share that both get wrong.
    """

    accuracy: Tensor
    both: Tensor
    only: Tensor
    neither: Tensor

    @property
    def pairs(self) -> Tensor:
        """T of every pair, (K, K): a^(i,j) - a^(i,i) + a^(j,i) - a^(j,j); 0 on the diagonal."""
        accuracy = self.accuracy[:-1, :-1]
        own = accuracy.diagonal()
        return accuracy + accuracy.T - own[:, None] - own[None, :]

    @property
    def T(self) -> float:
        """How much accuracy members keep on each other's images; larger means *less* transferable."""
        return _over_pairs(self.pairs)

    @property
    def nT(self) -> float:
        """1 - a^(en,en) - S00: the ensemble's errors that are not errors of both members.

        Images on which both members err and their average is right count against it.
        """
        return 1.0 - float(self.accuracy[-1, -1]) - _over_pairs(self.neither)

    @property
    def a_single(self) -> float:
        """a^(en,en) - S11: what the ensemble gets right without both members being right.

        At least 0 for two averaged members: where both are right, so is their average.
        """
        return float(self.accuracy[-1, -1]) - _over_pairs(self.both)


def transferability(defense: EnsembleDefense, y: Tensor, crafted: Mapping[int | str, Tensor]) -> Transferability:
    """CCE's accuracies, subsets and summaries (Bui et al. 2021, Table 6).

    Args:
        y: labels, (N,).
        crafted: images crafted on each member (keys 0 ... K-1) and on the ensemble (``"en"``), each (N, ...); see
            :func:`craft_on_each`. The paper: PGD, 20 steps of 2/255 at 8/255, CIFAR-10 test set.
    Raises:
        UsageError: a single member, or a key is missing.
    """
    members = len(defense.members)
    if members < 2:
        raise UsageError(f"transferability compares members, and the defence has {members}; expected at least 2")
    hits = torch.stack([_hits(defense, images, y) for images in _in_order(crafted, [*range(members), "en"])])
    seen = hits[-1, :-1].double()
    wrong = 1 - seen
    count = len(y)
    return Transferability(
        hits.double().mean(dim=2), seen @ seen.T / count, seen @ wrong.T / count, wrong @ wrong.T / count
    )


def right_for_all_members(defense: EnsembleDefense, x: Tensor, y: Tensor) -> Tensor:
    """Images that every member gets right, (N,) bool: what DVERGE's evaluations are restricted to."""
    return right(answer(defense, x).logits, y).all(dim=0)


def transfer_matrix(
    defense: EnsembleDefense, x: Tensor, y: Tensor, starts: Sequence[Mapping[int | str, Tensor]]
) -> Tensor:
    """DVERGE's transferability: success rates of images crafted on one member, (K, K+1), fractions.

    Entry (i, j) is the share of images on which at least one random start, crafted on member i, fools member j; the
    last column is the deployed ensemble. Only images that all members get right count. The released evaluation
    takes 1,000 of them and PGD with 50 steps of eps/5 and 5 starts at eps = 0.03.

    Args:
        x, y: clean images, (N, ...), and labels, (N,).
        starts: for each random start the images crafted on each member (keys 0 ... K-1), each (N, ...):
            ``[craft_on_each(defense, x, y, eps=0.03, steps=50, step_size="eps/5", seed=s) for s in range(5)]``.
    Raises:
        UsageError: no image is right for all members, no start, or a key is missing.
    """
    chosen = _chosen(defense, x, y)
    members = range(len(defense.members))
    if not starts:
        raise UsageError("starts is empty; expected the crafted images of at least one random start")
    robust = torch.ones(len(members), len(members) + 1, len(chosen), dtype=torch.bool, device=x.device)
    for crafted in starts:
        robust &= torch.stack([_hits(defense, images[chosen], y[chosen]) for images in _in_order(crafted, members)])
    return 1 - robust.double().mean(dim=2)


def diversity_matrix(
    defense: EnsembleDefense,
    x: Tensor,
    y: Tensor,
    *,
    eps: str | float = "0.07",
    steps: int = 10,
    seed: int = 0,
    batch_size: int = 10,
) -> Tensor:
    """DVERGE's diversity: mean cross-entropy of member j on images distilled from member i, (K, K), nats.

    The label is that of the *target* image, whose features were distilled (training uses the source's): the less j
    sees in them what i sees, the higher, and the more diverse the ensemble. Sources and targets are two random orders
    of the images that all members get right; every batch draws one layer, the same for all members.

    Args:
        x, y: images, (N, ...), and labels, (N,); the released evaluation takes 1,000.
        eps, steps: of :func:`distill`; defaults of the released evaluation.
        seed: of the orders and the layers.
        batch_size: images that share a layer; 10 in the released evaluation.
    Raises:
        UsageError: no image is right for all members, or a member has no numbered layers.
    """
    chosen = _chosen(defense, x, y)
    layers = min(network_of(member).num_layers for member in defense.members)
    rng = torch.Generator().manual_seed(seed)
    sources, targets = (chosen[torch.randperm(len(chosen), generator=rng).to(x.device)] for _ in range(2))
    total = torch.zeros(len(defense.members), len(defense.members), dtype=torch.float64, device=x.device)
    for source, target in zip(sources.split(batch_size), targets.split(batch_size), strict=True):
        layer = int(torch.randint(1, layers + 1, (), generator=rng))
        distilled = [distill(member, x[source], x[target], layer, eps=eps, steps=steps) for member in defense.members]
        losses = member_cross_entropy(answer(defense, torch.cat(distilled)).logits, y[target].repeat(len(distilled)))
        # asked member, member distilled from, image
        total += losses.double().view(len(distilled), len(distilled), -1).sum(dim=2).T
    return total / len(chosen)


def _hits(defense: EnsembleDefense, x: Tensor, y: Tensor) -> Tensor:
    """Who is right: members, then the ensemble, (K+1, N) bool."""
    answers = answer(defense, x)
    return torch.cat([right(answers.logits, y), right(answers.scores, y)[None]])


def _chosen(defense: EnsembleDefense, x: Tensor, y: Tensor) -> Tensor:
    """Positions of the images that all members get right."""
    chosen = right_for_all_members(defense, x, y).nonzero().squeeze(1)
    if not len(chosen):
        raise UsageError(
            f"none of the {len(x)} images is right for all {len(defense.members)} members, so there is nothing to "
            "compare them on; give more images, or use transferability, which asks for no common ones"
        )
    return chosen


def _in_order(crafted: Mapping[int | str, Tensor], keys: Sequence[int | str]) -> list[Tensor]:
    missing = [key for key in keys if key not in crafted]
    if missing:
        raise UsageError(f"no images crafted on {missing[0]!r}; expected keys {', '.join(map(repr, keys))}")
    return [crafted[key] for key in keys]


def _over_pairs(matrix: Tensor) -> float:
    """Mean over ordered pairs of different members, (K, K) -> scalar."""
    members = len(matrix)
    return float((matrix.sum() - matrix.trace()) / (members * (members - 1)))
