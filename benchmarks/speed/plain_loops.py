"""Training steps as the papers' released codes write them: the baselines of ``training.py``.

Every attack step runs with batch norm in train mode and calls ``backward()``, so that gradients pile up in the
parameters; ensembles average clamped probabilities; DVERGE computes its target features anew at every step. Plain
PyTorch throughout, nothing of ensdef's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS, K = 8 / 255, 10
ALPHA = EPS / 4


@dataclass
class Setup:
    """What a step trains: three member networks and what hangs beside them."""

    members: Sequence[nn.Module]
    extras: nn.ModuleDict
    optimizer: torch.optim.Optimizer


Step = Callable[[Setup, Tensor, Tensor], None]


def mean_log_probability(members: Sequence[nn.Module], x: Tensor) -> Tensor:
    return torch.log(torch.clamp(sum(F.softmax(m(x), dim=1) for m in members) / len(members), min=1e-40))


def max_log_probability(members: Sequence[nn.Module], x: Tensor) -> Tensor:
    return torch.log(torch.stack([F.softmax(m(x), dim=1) for m in members]).amax(0).clamp(min=1e-40))


def pgd(surface: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, eps: float = EPS, alpha: float = ALPHA) -> Tensor:
    adv = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(K):
        adv = adv.detach().requires_grad_()
        F.cross_entropy(surface(adv), y).backward()
        adv = (x + (adv.detach() + alpha * adv.grad.sign() - x).clamp(-eps, eps)).clamp(0, 1)
    return adv.detach()


def pgd_l2(surface: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, eps: float, alpha: float) -> Tensor:
    adv = x
    for _ in range(K):
        adv = adv.detach().requires_grad_()
        F.cross_entropy(surface(adv), y).backward()
        step = adv.grad / (adv.grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 1e-12)
        delta = adv.detach() + alpha * step - x
        delta = delta * (eps / (delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 1e-12)).clamp(max=1)
        adv = (x + delta).clamp(0, 1)
    return adv.detach()


def update(setup: Setup, loss: Tensor) -> None:
    setup.optimizer.zero_grad()
    loss.backward()
    setup.optimizer.step()


def summed_ce(members: Sequence[nn.Module], x: Tensor, y: Tensor) -> Tensor:
    return sum((F.cross_entropy(m(x), y) for m in members), torch.zeros(()))


def adv_en(setup: Setup, x: Tensor, y: Tensor) -> None:
    adv = pgd(lambda z: mean_log_probability(setup.members, z), x, y)
    update(setup, summed_ce(setup.members, adv, y))


def adv(setup: Setup, x: Tensor, y: Tensor) -> None:
    member = setup.members[0]
    update(setup, F.cross_entropy(member(pgd(member, x, y)), y))


def adp_loss(members: Sequence[nn.Module], x: Tensor, y: Tensor) -> Tensor:
    logits = [m(x) for m in members]
    probs = torch.stack([F.softmax(z, dim=1) for z in logits], dim=1)
    mean = probs.mean(1)
    entropy = (-mean * torch.log(mean + 1e-20)).sum(1).mean()
    mask = torch.ones_like(mean, dtype=torch.bool).scatter(1, y[:, None], False)
    wrong = probs.masked_select(mask[:, None]).view(len(x), len(members), -1)
    wrong = wrong / wrong.norm(dim=2, keepdim=True)
    gram = wrong @ wrong.transpose(1, 2) + 1e-6 * torch.eye(len(members))
    return sum(F.cross_entropy(z, y) for z in logits) - 2 * entropy - 0.5 * torch.logdet(gram.double()).mean().float()


def adp(setup: Setup, x: Tensor, y: Tensor) -> None:
    adv = pgd(lambda z: mean_log_probability(setup.members, z), x, y)
    update(setup, adp_loss(setup.members, x, y) + adp_loss(setup.members, adv, y))


def gal(setup: Setup, x: Tensor, y: Tensor) -> None:
    members = setup.members
    adv = pgd(lambda z: mean_log_probability(members, z), x, y)
    seen = x.clone().requires_grad_()
    gradients, loss = [], torch.zeros(())
    for m in members:
        gradients.append(torch.autograd.grad(F.cross_entropy(m(seen), y), seen, create_graph=True)[0].flatten(1))
        loss = loss + F.cross_entropy(m(x), y) + F.cross_entropy(m(adv), y)
    cosines = torch.stack([F.cosine_similarity(a, b, dim=1) for a, b in combinations(gradients, 2)], dim=1)
    update(setup, loss / len(members) + 0.5 * torch.log(cosines.exp().sum(1) + 1e-20).mean())


def trs(setup: Setup, x: Tensor, y: Tensor) -> None:
    members = setup.members

    def squared_norm(z: Tensor) -> Tensor:
        total = torch.zeros(())
        for m in members:
            gradient = torch.autograd.grad(F.cross_entropy(m(z), y[: len(z)]), z, create_graph=True)[0]
            total = total + 2 * gradient.flatten(1).square().sum(1).mean()
        return total / len(members)

    seen = x.clone().requires_grad_()
    gradients, loss = [], torch.zeros(())
    for m in members:
        ce = F.cross_entropy(m(seen), y)
        gradients.append(torch.autograd.grad(ce, seen, create_graph=True)[0].flatten(1))
        loss = loss + ce
    cosine = sum(F.cosine_similarity(a, b, dim=1).abs().mean() for a, b in combinations(gradients, 2)) / 3
    half, delta = len(x) // 2, EPS
    moved = x[half:]
    for _ in range(6):
        moved = moved.detach().requires_grad_()
        squared_norm(moved).backward()
        moved = (x[half:] + (moved.detach() + delta / 3 * moved.grad.sign() - x[half:]).clamp(-delta, delta)).clamp(
            0, 1
        )
    searched = torch.cat([x[:half], moved]).detach().requires_grad_()
    update(setup, loss + 5 * (2 * cosine + 2 * squared_norm(searched)))


def soe(setup: Setup, x: Tensor, y: Tensor) -> None:
    members, heads, sigma = setup.members, setup.extras["heads"], 0.5

    def selected(z: Tensor) -> Tensor:
        logits, confidence = zip(*(m(z, with_embedding=True) for m in members), strict=True)
        scores = torch.stack([head(e).squeeze(1) for head, e in zip(heads, confidence, strict=True)])
        return torch.stack(logits)[scores.argmax(0), torch.arange(len(z))]

    crafted = [(pgd(m, x, y), 0.5 / len(members)) for m in members] + [(pgd(selected, x, y), 0.5)]
    loss = torch.zeros(())
    for adv, weight in crafted:
        losses, head_loss = [], torch.zeros(())
        for m, head in zip(members, heads, strict=True):
            logits, embedding = m(adv, with_embedding=True)
            losses.append(F.cross_entropy(logits, y, reduction="none"))
            target = F.softmax(logits.detach(), 1).gather(1, y[:, None]).squeeze(1)
            head_loss = head_loss + F.binary_cross_entropy_with_logits(head(embedding.detach()).squeeze(1), target)
        loss = loss + weight * (-sigma * torch.logsumexp(-torch.stack(losses) / sigma, 0).mean() + head_loss)
    update(setup, loss)


def cce(setup: Setup, x: Tensor, y: Tensor) -> None:
    members = setup.members
    crafted = [pgd(m, x, y) for m in members]
    pgd(lambda z: mean_log_probability(members, z), x, y)  # the released code monitors this at every step
    loss = torch.zeros(())
    for n, m in enumerate(members):
        loss = loss + F.cross_entropy(m(x), y)
        for i, adv in enumerate(crafted):
            logits = m(adv)
            ce = F.cross_entropy(logits, y, reduction="none")
            if i == n:
                loss = loss + ce.mean()
            else:
                probs = F.softmax(logits, 1)
                weight = probs.gather(1, y[:, None]).squeeze(1).detach()
                entropy = -(probs * torch.log(probs + 1e-20)).sum(1)
                loss = loss + ((weight * ce - (1 - weight) * entropy) / (len(members) - 1)).mean()
    update(setup, loss)


def dverge(setup: Setup, x: Tensor, y: Tensor) -> None:
    members, layer = setup.members, random.randrange(1, setup.members[0].num_layers + 1)
    target = x.flip(0)
    distilled, crafted = [], []
    for m in members:
        z, velocity = x, torch.zeros_like(x)
        for _ in range(10):
            z = z.detach().requires_grad_()
            goal = m.features(target, layer).detach()
            F.mse_loss(m.features(z, layer), goal).backward()
            velocity = velocity + z.grad / z.grad.abs().flatten(1).sum(1).clamp_min(1e-12).view(-1, 1, 1, 1)
            z = (x + (z.detach() - 0.007 * velocity.sign() - x).clamp(-0.07, 0.07)).clamp(0, 1)
        distilled.append(z.detach())
        crafted.append(pgd(m, x, y))
    loss = torch.zeros(())
    for i, m in enumerate(members):
        loss = loss + F.cross_entropy(m(crafted[i]), y)
        loss = loss + sum(F.cross_entropy(m(z), y) for j, z in enumerate(distilled) if j != i)
    update(setup, loss)


def igat_adp(setup: Setup, x: Tensor, y: Tensor) -> None:
    members = setup.members
    adv = pgd(lambda z: mean_log_probability(members, z), x, y)
    logits = torch.stack([m(adv) for m in members])
    probs = F.softmax(logits, 2)
    true = probs[:, torch.arange(len(y)), y].detach()
    ranks = true.argsort(0, descending=True).argsort(0)
    drawn = torch.multinomial((2.0 ** (len(members) - 1 - ranks)).T, 1).squeeze(1)
    distributed = F.cross_entropy(logits[drawn, torch.arange(len(y))], y)
    failed = probs.mean(0).argmax(1) != y
    worst = probs.masked_fill(F.one_hot(y, 10).bool(), 0).amax(2).clamp(0, 0.99)
    penalty = (-torch.log(1 - worst).sum(0) * failed).mean()
    members_ce = sum(F.cross_entropy(z, y) for z in logits)
    update(setup, 5 * distributed + 10 * penalty + adp_loss(members, x, y) + members_ce)


def cldl(setup: Setup, x: Tensor, y: Tensor) -> None:
    members, extras = setup.members, setup.extras
    adv = pgd(lambda z: mean_log_probability(members, z), x, y)
    seen = x.clone().requires_grad_()

    def soft_label(embedding: Tensor) -> tuple[Tensor, Tensor]:
        classes = torch.tanh(extras["project"](extras["classes"].weight))
        confusion = F.softmax(extras["mix"](embedding @ classes.T), 1)
        return confusion, F.softmax(confusion + 4 * F.one_hot(y, 10), 1)

    loss, gradients, confusions = torch.zeros(()), [], []
    for m in members:
        for z in (seen, adv):
            logits = m(z)
            _, embedding = m(z, with_embedding=True)  # the released code runs the backbone a second time
            confusion, label = soft_label(embedding)
            kl = (label * (torch.log(label + 1e-6) - F.log_softmax(logits, 1))).sum(1).mean()
            loss = loss + kl / len(members)
            if z is seen:
                gradients.append(torch.autograd.grad(kl, seen, create_graph=True)[0].flatten(1))
                confusions.append(confusion)
    cosine = sum(F.cosine_similarity(a, b, dim=1).abs().mean() for a, b in combinations(gradients, 2)) / len(members)
    divergence = []
    for a, b in combinations(confusions, 2):
        middle = (a + b) / 2
        kl = 0.5 * (a * torch.log2(a / middle) + b * torch.log2(b / middle)).mean()
        divergence.append(kl.exp())
    update(setup, loss - 2 * torch.log(sum(divergence) / 3 + 1e-6) + 4 * cosine)


def more_lp(setup: Setup, x: Tensor, y: Tensor) -> None:
    experts, gate = setup.members, setup.extras["gate"]

    def mixture(z: Tensor) -> Tensor:
        weights = F.softmax(gate(z), dim=1)
        return sum(weights[:, i, None] * expert(z) for i, expert in enumerate(experts))

    crafted = [lambda: x, lambda: x]
    crafted += [lambda e=e: pgd_l2(mixture, x, y, e, 2.5 * e / K) for e in (0.5, 1.0)]
    crafted += [lambda e=e: pgd(mixture, x, y, e, e / 4) for e in (6 / 255, 8 / 255)]
    for craft in crafted:
        update(setup, F.cross_entropy(mixture(craft()), y))


def max_of_norms(setup: Setup, x: Tensor, y: Tensor) -> None:
    member = setup.members[0]
    crafted = [pgd(member, x, y), pgd_l2(member, x, y, 1.0, 0.25)]
    losses = torch.stack([F.cross_entropy(member(z), y, reduction="none") for z in crafted])
    worst = losses.argmax(0)
    chosen = torch.stack(crafted)[worst, torch.arange(len(y))]
    update(setup, F.cross_entropy(member(chosen), y))


def avg_of_norms(setup: Setup, x: Tensor, y: Tensor) -> None:
    member = setup.members[0]
    for craft in (lambda: pgd(member, x, y), lambda: pgd_l2(member, x, y, 1.0, 0.25)):
        update(setup, F.cross_entropy(member(craft()), y))


def msd(setup: Setup, x: Tensor, y: Tensor) -> None:
    member = setup.members[0]
    delta, best, best_loss = torch.zeros_like(x), torch.zeros_like(x), torch.full((len(x),), -torch.inf)
    for _ in range(K):
        delta = delta.detach().requires_grad_()
        member(x + delta)  # the released code asks which images are still right before every step
        F.cross_entropy(member(x + delta), y).backward()
        gradient = delta.grad
        linf = (delta.detach() + ALPHA * gradient.sign()).clamp(-EPS, EPS)
        l2 = delta.detach() + 0.25 * gradient / (gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 1e-12)
        l2 = l2 * (1.0 / (l2.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 1e-12)).clamp(max=1)
        candidates = [(x + candidate).clamp(0, 1) - x for candidate in (linf, l2)]
        with torch.no_grad():
            losses = torch.stack([F.cross_entropy(member(x + c), y, reduction="none") for c in candidates])
        highest, which = losses.max(0)
        delta = torch.stack(candidates)[which, torch.arange(len(x))]
        better = highest > best_loss
        best[better], best_loss = delta[better], torch.maximum(highest, best_loss)
    update(setup, F.cross_entropy(member(x + best), y))


STEPS: dict[str, Step] = {
    "adv": adv,
    "adv_en": adv_en,
    "adp": adp,
    "gal[adversarial=true]": gal,
    "trs[adversarial=true]": trs,
    "cldl[adversarial=true]": cldl,
    "dverge[adversarial=true]": dverge,
    "soe": soe,
    "cce": cce,
    "igat[base=adp]": igat_adp,
    "more": more_lp,
    "max": max_of_norms,
    "avg[sequential=true]": avg_of_norms,
    "msd": msd,
}


def setup_for(method: str, members: Sequence[nn.Module], make_gate: Callable[[int], nn.Module]) -> Setup:
    """The optimiser and the modules beside the members that a plain loop needs."""
    width = members[0].embedding_size
    extras = nn.ModuleDict()
    if method == "soe":
        extras["heads"] = nn.ModuleList(nn.Linear(width, 1) for _ in members)
    if method.startswith("cldl"):
        extras["classes"], extras["project"] = nn.Embedding(10, 64), nn.Linear(64, width)
        extras["mix"] = nn.Linear(10, 10)
    if method == "more":
        extras["gate"] = make_gate(len(members))
        for member in members:
            for name, parameter in member.named_parameters():
                parameter.requires_grad_(name.startswith("classifier"))
    moved = [p for module in (*members, extras) for p in module.parameters() if p.requires_grad]
    return Setup(members, extras, torch.optim.SGD(moved, lr=1e-3, momentum=0.9))
