"""No speed option changes a verdict: random small ensembles, attacked fast and by a plain loop that saves nothing.

The plain loop below is written for this file: the untouched ensemble in its own layout, all images at once, every run
to its end, nothing dropped, nothing asked ahead, nothing remembered, no reduced precision; success is read off a pass
of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ensdef import create_defense
from ensdef.attack import IterativeAttack
from ensdef.attack_spec import AttackSpec
from ensdef.defense import EnsembleDefense
from ensdef.harness import Outcome, attack_model
from ensdef.registry import ATTACKS
from ensdef.rng import KeyedRandom
from ensdef.target import Target
from ensdef.threat import Threat

SHAPE, CLASSES = (1, 8, 8), 4
EPS = {"linf": 0.1, "l2": 1.0}
#: Attacks whose steps depend on the scores smoothly enough that float rounding seldom matters; one of each kind.
ATTACKS_TRIED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("fgsm", {}),
    ("pgd", {"steps": 5, "restarts": 2}),
    ("mim", {"steps": 5}),
    ("mul_pgd", {"steps": 3}),
    ("sgm", {"steps": 4}),
    ("m_fgsm", {"steps": 4}),
    ("square", {"queries": 25}),
    ("simba", {"queries": 25}),
    ("signhunter", {"queries": 25}),
    ("spsa", {"steps": 3, "samples": 8}),
)


def ensemble(seed: int, members: int, method: str, scale: float) -> EnsembleDefense:
    """Random weights, and batch norms whose statistics are those of the images below."""
    model = create_defense(
        method, architecture="small_resnet[width=4]", members=members, num_classes=CLASSES, image_shape=SHAPE, seed=seed
    )
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model.member_logits(torch.rand(64, *SHAPE, generator=torch.Generator().manual_seed(seed)))
        for part in model.modules():
            if isinstance(part, nn.Linear):  # untrained networks hardly tell images apart
                part.weight.mul_(scale)
    return model.eval()


def labelled(model: nn.Module, seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Images with the model's own decisions as labels, a few of them wrong."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, *SHAPE, generator=generator)
    with torch.no_grad():
        y = model(x).argmax(dim=1)
    y[::7] = (y[::7] + 1) % CLASSES
    return x, y


def plainly(model: nn.Module, x: Tensor, y: Tensor, spec: AttackSpec) -> Tensor:
    """Which images are right on the clean image and on every point offered, (N,) bool."""
    attack: Any = ATTACKS.get(spec.name)(spec.params_object)
    target = Target(model, fold=False)
    if not isinstance(attack, IterativeAttack):
        ((_, attack),) = attack.parts(target.traits(x[:1]))
    assert spec.eps_value is not None
    threat, ids = Threat(spec.norm, spec.eps_value), torch.arange(len(x))

    def wrong(points: Tensor) -> Tensor:
        with torch.no_grad():
            return model(points).argmax(dim=1) != y

    fooled = wrong(x)
    for run in range(attack.runs(CLASSES)):
        rng = KeyedRandom(spec.seed, ids, run)
        state = dict(attack.start(target, x.clone(), y, threat, rng))
        x_adv = threat.project(state.pop("x_adv", x), x)
        ended = torch.zeros_like(fooled)
        for step in range(1, attack.steps + 1):
            fooled |= wrong(x_adv) & ~ended
            x_new, state = attack.step(target, x_adv, y, state, threat, rng.at(run=run, step=step))
            target.forget()
            state = {name: value.detach() for name, value in state.items()}
            x_new = threat.project(x_new.detach(), x)
            over = ended.clone()
            ended |= state.pop("done", torch.zeros_like(ended))
            x_adv = torch.where(over.view(-1, 1, 1, 1), x_adv, x_new)
        fooled |= wrong(x_adv)
    return ~fooled


def fast(model: nn.Module, x: Tensor, y: Tensor, spec: AttackSpec, batch_size: int) -> Outcome:
    return attack_model(model, x, y, spec, batch_size=batch_size, health="off")


IN_NORMS = [
    (*tried, norm)
    for tried in ATTACKS_TRIED
    for norm in ("linf", "l2")
    if norm in ATTACKS.get(tried[0]).norms_for(ATTACKS.get(tried[0]).Params(**tried[1]))
]


class Case(NamedTuple):
    """An ensemble, its images, and an attack with its parameters and norm."""

    seed: int
    members: int
    method: str
    attack: tuple[str, dict[str, Any], str]
    count: int
    batch_size: int
    scale: float


cases = given(
    case=st.builds(
        Case,
        seed=st.integers(0, 10_000),
        members=st.integers(1, 4),
        method=st.sampled_from(["nat", "soe"]),
        attack=st.sampled_from(IN_NORMS),
        count=st.integers(1, 70),
        batch_size=st.sampled_from([1, 16, 33, 128]),
        scale=st.sampled_from([4.0, 20.0]),
    )
)
found = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.slow
@found
@cases
def test_fast_and_plain_find_the_same_images(case: Case) -> None:
    model = ensemble(case.seed, case.members, case.method, case.scale)
    x, y = labelled(model, case.seed, case.count)
    name, params, norm = case.attack
    spec = AttackSpec.create(name, params, norm, EPS[norm], seed=case.seed)
    assert torch.equal(fast(model, x, y, spec, case.batch_size).robust, plainly(model, x, y, spec))


@pytest.mark.slow
@settings(found, max_examples=30)
@cases
def test_a_search_in_bf16_finds_no_success_that_fp32_denies_and_both_are_never_weaker_than_fp32(case: Case) -> None:
    model = ensemble(case.seed, case.members, case.method, case.scale)
    x, y = labelled(model, case.seed, case.count)
    name, params, norm = case.attack
    robust = {}
    for search in ("fp32", "bf16", "bf16+fp32"):
        spec = AttackSpec.create(name, params, norm, EPS[norm], seed=case.seed, search=search)
        outcome = fast(model, x, y, spec, case.batch_size)
        robust[search] = outcome.robust
        with torch.no_grad():
            assert torch.equal(model(outcome.x_adv).argmax(dim=1) == y, outcome.robust)
        distance = Threat(norm, EPS[norm]).distance(outcome.x_adv, x)
        assert bool((distance <= EPS[norm] + 1e-6).all())
    assert torch.equal(robust["bf16+fp32"], robust["bf16"] & robust["bf16+fp32"])
    assert not bool((robust["bf16+fp32"] & ~robust["fp32"]).any()), "never weaker than fp32 alone"


def test_the_cases_above_have_something_to_find() -> None:
    """Of the images that are right (six in seven), the attacks fool many and leave many."""
    for method in ("nat", "soe"):
        model = ensemble(3, 3, method, 20.0)
        x, y = labelled(model, 3, 60)
        shares = []
        for name, params in ATTACKS_TRIED:
            robust = plainly(model, x, y, AttackSpec.create(name, params, "linf", EPS["linf"]))
            shares.append(float(robust.float().mean()))
        assert 0.2 < min(shares) < 0.7, [f"{share:.2f}" for share in shares]
        assert min(shares) < max(shares) < 6 / 7, [f"{share:.2f}" for share in shares]
