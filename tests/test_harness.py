"""The harness: what it counts, whom it believes, what it refuses, and what attacks cannot spoil."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import ensdef.harness
from ensdef import combine
from ensdef.attack import IterativeAttack, State, WholeAttack
from ensdef.attack_spec import AttackSpec
from ensdef.defense import Batch, EnsembleDefense, Terms
from ensdef.errors import AttackError, PluginError, UsageError
from ensdef.evaluation import evaluate
from ensdef.harness import Outcome, attack_model
from ensdef.registry import ATTACKS
from ensdef.rng import KeyedRandom
from ensdef.target import Target
from ensdef.testing import LinearClassifier
from ensdef.threat import Threat

CLASSES, SHAPE = 4, (1, 4, 4)
PIXELS = 16
#: No image of the toys is fooled within this radius.
NOTHING = 1e-6


Register = Callable[[type], str]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    """Make an attack class known for one test; returns its name."""

    def add(cls: type) -> str:
        name = f"toy_{cls.__name__.lower()}"
        monkeypatch.setitem(ATTACKS._registered, name, cls)
        return name

    return add


@dataclass(frozen=True)
class ToyParams:
    steps: int = 3
    restarts: int = 1


class Toy(IterativeAttack):
    """Base of the attacks below: stays where it is."""

    Params = ToyParams

    def step(
        self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
    ) -> tuple[Tensor, State]:
        return x_adv, state


class Mean(EnsembleDefense):
    """Log mean probability of given members."""

    def loss(self, batch: Batch, progress: float) -> Terms:
        raise NotImplementedError


def linear(seed: int = 0, classes: int = CLASSES) -> LinearClassifier:
    return LinearClassifier(torch.randn(classes, PIXELS, generator=torch.Generator().manual_seed(seed)))


def ensemble(members: int = 3) -> Mean:
    return Mean([linear(seed) for seed in range(members)])


def images(count: int, low: float = 0.2, high: float = 0.8) -> Tensor:
    return low + (high - low) * torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(5))


def decisions(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(dim=1)


def attacked(
    model: nn.Module,
    name: str,
    x: Tensor,
    *,
    y: Tensor | None = None,
    eps: float = NOTHING,
    norm: str = "linf",
    search: str = "fp32",
    combiner: str = "native",
    batch_size: int = 16,
    **params: Any,
) -> Outcome:
    spec = AttackSpec.create(name, params, norm, eps, search=search, combiner=combiner)
    return attack_model(model, x, decisions(model, x) if y is None else y, spec, batch_size=batch_size)


# --- counting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("success", ["any", "last"])
@pytest.mark.parametrize("count", [1, 5, 16, 37])
@pytest.mark.parametrize(("steps", "restarts"), [(5, 1), (4, 3), (1, 1), (0, 2)])
def test_an_image_that_is_never_fooled_costs_r_times_s_plus_one_forwards_and_r_times_s_backwards(
    count: int, steps: int, restarts: int, success: str
) -> None:
    outcome = attacked(linear(), "pgd", images(count), steps=steps, restarts=restarts, success=success)
    assert bool(outcome.robust.all())
    assert outcome.forwards == count * restarts * (steps + 1)
    assert outcome.backwards == count * restarts * steps


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("count", [5, 37])
def test_passes_are_counted_by_member(members: int, count: int) -> None:
    outcome = attacked(ensemble(members), "pgd", images(count), steps=4, restarts=2)
    assert outcome.forwards == members * count * 2 * 5
    assert outcome.backwards == members * count * 2 * 4


@pytest.mark.parametrize("loss", ["targeted", "targeted_margin"])
def test_a_targeted_attack_costs_one_run_a_wrong_class(loss: str) -> None:
    outcome = attacked(linear(), "pgd", images(20), steps=3, loss=loss, restarts=2)
    assert outcome.forwards == 20 * 2 * (CLASSES - 1) * 4
    assert outcome.backwards == 20 * 2 * (CLASSES - 1) * 3


def test_an_image_that_was_wrong_costs_nothing() -> None:
    model, x = linear(), images(20)
    y = decisions(model, x)
    y[::2] = (y[::2] + 1) % CLASSES
    assert attacked(model, "pgd", x, y=y, steps=3).forwards == 10 * 4


def test_a_fooled_image_costs_nothing_more() -> None:
    model, x = linear(classes=2), images(37)
    outcome = attacked(model, "pgd", x, eps=0.6, random_start=False, steps=50, step_size="eps", restarts=3)
    assert not bool(outcome.robust.any())
    # the image, the first point, and the judgement of that point
    assert outcome.forwards == 37 * 3
    assert outcome.backwards == 37 * 2


def test_under_last_a_fooled_image_costs_its_run_to_the_end_and_no_further_run() -> None:
    model, x = linear(classes=2), images(20)
    outcome = attacked(model, "pgd", x, eps=0.6, random_start=False, steps=5, restarts=3, success="last")
    assert not bool(outcome.robust.any())
    assert outcome.forwards == 20 * 6
    assert outcome.backwards == 20 * 5


@pytest.mark.parametrize("count", [5, 37])
def test_passes_of_the_start_are_counted_once_an_image(register: Register, count: int) -> None:
    class Looks(Toy):
        def start(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> State:
            with torch.no_grad():
                target(x)
            return {}

    outcome = attacked(linear(), register(Looks), images(count), steps=3, restarts=2)
    assert outcome.forwards == count * 2 * (1 + 3 + 1)


def test_a_pass_the_attack_made_on_the_current_point_is_not_made_again(register: Register) -> None:
    class Ascent(Toy):
        """One step uphill; subclasses choose what they evaluate."""

        def seen(self, x_adv: Tensor) -> Tensor:
            return x_adv.detach()

        def step(
            self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
        ) -> tuple[Tensor, State]:
            point = self.seen(x_adv).requires_grad_()
            loss = nn.functional.cross_entropy(target(point), y, reduction="sum")
            return x_adv + threat.eps / 4 * torch.autograd.grad(loss, point)[0].sign(), state

    class OnCopy(Ascent):
        def seen(self, x_adv: Tensor) -> Tensor:
            return x_adv.clone()

    model, x = linear(), images(30)
    cheap, dear = (attacked(model, register(cls), x, steps=4) for cls in (Ascent, OnCopy))
    assert cheap.forwards == 30 * (4 + 1)
    assert dear.forwards == 30 * (2 * 4 + 1)
    cheap, dear = (attacked(model, register(cls), x, steps=4, eps=0.1) for cls in (Ascent, OnCopy))
    assert 0 < int(cheap.robust.sum()) < 30
    assert torch.equal(cheap.robust, dear.robust)
    assert torch.equal(cheap.x_adv, dear.x_adv)


def test_a_search_in_two_precisions_counts_both() -> None:
    outcome = attacked(linear(), "pgd", images(20), steps=3, search="bf16+fp32")
    assert outcome.forwards == 20 * 2 * 4
    assert outcome.backwards == 20 * 2 * 3


# --- whom the harness believes --------------------------------------------------------------------


class Lying(Target):
    """A target whose folded copy, on which attacks search, ranks the classes the other way round."""

    def __init__(self, model: nn.Module, *, fold: bool = True, **more: Any) -> None:
        super().__init__(model, fold=fold, **more)
        self.lies = fold

    def _predict(self, x: Tensor) -> Tensor:
        scores = super()._predict(x)
        return -scores if self.lies else scores


def test_a_success_that_the_true_model_denies_is_none_and_the_image_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ensdef.harness, "Target", Lying)
    model, x = linear(), images(37)
    outcome = attacked(model, "pgd", x, steps=5, restarts=2)
    assert bool(outcome.robust.all())
    assert outcome.unconfirmed == 0
    # every point is claimed and judged: s + 1 judgements beside the s passes of the search
    assert outcome.backwards == 37 * 2 * 5
    assert outcome.forwards == 37 * 2 * (5 + 5 + 1)


def test_after_a_denied_claim_the_run_ends_where_it_would_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shifted(Lying):
        """Claims every point, by a score that has no gradient."""

        def _predict(self, x: Tensor) -> Tensor:
            scores = Target._predict(self, x)
            return scores - 2 * scores.detach() if self.lies else scores

    model, x = linear(classes=2), images(37)
    honest = attacked(model, "bim", x, steps=5, eps=0.001, loss="margin")
    monkeypatch.setattr(ensdef.harness, "Target", Shifted)
    claimed = attacked(model, "bim", x, steps=5, eps=0.001, loss="margin")
    kept = honest.robust
    assert bool(kept.any())
    assert torch.equal(honest.robust, claimed.robust)
    torch.testing.assert_close(claimed.x_adv[kept], honest.x_adv[kept], rtol=0, atol=2e-7)


def test_a_run_that_ended_early_on_a_denied_claim_is_judged_once_more_where_it_ended_and_not_tried_again(
    register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Satisfied(Toy):
        """Looks once, moves, and thinks that it is done."""

        def step(
            self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
        ) -> tuple[Tensor, State]:
            target(x_adv)
            return x_adv + 0.01, {"done": torch.ones_like(y, dtype=torch.bool)}

    monkeypatch.setattr(ensdef.harness, "Target", Lying)
    model, x = linear(), images(37)
    outcome = attacked(model, register(Satisfied), x, steps=30, eps=0.05)
    assert bool(outcome.robust.all())
    # the search's look, the judgement of its claim, the judgement of the end
    assert outcome.forwards == 37 * 3
    torch.testing.assert_close(outcome.x_adv, (x + 0.01).clamp(0, 1))


def coarse() -> LinearClassifier:
    """Classes that differ in the last bits of their weights only: bf16 cannot tell them apart."""
    generator = torch.Generator().manual_seed(2)
    common = 40 + 20 * torch.rand(1, PIXELS, generator=generator)
    return LinearClassifier(common + 0.05 * torch.randn(CLASSES, PIXELS, generator=generator))


@pytest.mark.parametrize("search", ["bf16", "bf16+fp32"])
def test_a_search_in_bf16_never_reports_a_success_that_fp32_denies(search: str) -> None:
    model, x = coarse(), images(64)
    y = decisions(model, x)
    with torch.no_grad():
        disagree = Target(model, precision="bf16")(x).argmax(dim=1) != y
    assert int(disagree.sum()) > 10  # or this test would show nothing
    nowhere = attacked(model, "pgd", x, steps=4, search=search)
    assert bool(nowhere.robust.all())
    somewhere = attacked(model, "pgd", x, steps=4, search=search, eps=0.15)
    fooled = ~somewhere.robust
    assert bool(fooled.any())
    assert bool((decisions(model, somewhere.x_adv)[fooled] != y[fooled]).all())
    assert somewhere.unconfirmed == 0


@pytest.mark.parametrize("make", [coarse, linear, ensemble])
@pytest.mark.parametrize("success", ["any", "last"])
def test_bf16_with_fp32_for_the_survivors_is_never_weaker_than_fp32_alone(
    make: Callable[[], nn.Module], success: str
) -> None:
    model, x = make(), images(64)
    eps = 0.06 if make is coarse else 0.03
    alone = attacked(model, "pgd", x, steps=4, eps=eps, success=success)
    both = attacked(model, "pgd", x, steps=4, eps=eps, success=success, search="bf16+fp32")
    assert 0 < int(alone.robust.sum()) < len(x)
    assert not bool((both.robust & ~alone.robust).any())


def test_a_robust_image_is_right_at_the_point_that_is_returned_and_a_fooled_one_is_wrong() -> None:
    model, x = ensemble(), images(64)
    outcome = attacked(model, "pgd", x, steps=4, eps=0.06)
    assert 0 < int(outcome.robust.sum()) < 64
    assert torch.equal(decisions(model, outcome.x_adv) == decisions(model, x), outcome.robust)


# --- success --------------------------------------------------------------------------------------


def away(model: LinearClassifier, y: Tensor) -> Tensor:
    """The direction that turns the decision of a two-class model, (B, *SHAPE)."""
    weight = model.weight.detach()
    return (weight[1 - y] - weight[y]).sign().view(-1, *SHAPE)


def wanderer(model: LinearClassifier, fools: Callable[[KeyedRandom], Tensor]) -> type[Toy]:
    """An attack that stands at a fooling point after the steps where ``fools`` says so, else at the image."""

    class Wanderer(Toy):
        def start(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> State:
            return {"home": x}

        def step(
            self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
        ) -> tuple[Tensor, State]:
            where = fools(rng).view(-1, 1, 1, 1)
            return torch.where(where, state["home"] + threat.eps * away(model, y), state["home"]), state

    return Wanderer


def test_a_success_on_the_way_counts_under_any_and_not_under_last(register: Register) -> None:
    model, x = linear(classes=2), images(20)
    name = register(wanderer(model, lambda rng: rng.step == 2))
    assert not bool(attacked(model, name, x, eps=0.6, steps=4).robust.any())
    assert bool(attacked(model, name, x, eps=0.6, steps=4, success="last").robust.all())


@pytest.mark.parametrize("success", ["any", "last"])
def test_one_run_that_ends_in_success_is_enough_and_the_rest_is_saved(register: Register, success: str) -> None:
    model, x = linear(classes=2), images(20)
    name = register(wanderer(model, lambda rng: (rng.step == 4) & (rng.run == 2)))
    outcome = attacked(model, name, x, eps=0.6, steps=4, restarts=5, success=success)
    assert not bool(outcome.robust.any())
    passes = 4 if success == "any" else 0  # the attack itself makes none
    assert outcome.forwards == 20 * 3 * (passes + 1)
    expected = (x + 0.6 * away(model, decisions(model, x))).clamp(0, 1)
    torch.testing.assert_close(outcome.x_adv, expected, rtol=0, atol=1e-6)
    too_few = attacked(model, name, x, eps=0.6, steps=4, restarts=2, success=success)
    assert bool(too_few.robust.all())


def test_the_point_of_a_robust_image_is_the_last_of_its_last_run(register: Register) -> None:
    class Marks(Toy):
        def step(
            self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
        ) -> tuple[Tensor, State]:
            return torch.full_like(x_adv, 0.5) + (rng.run * 10 + rng.step).view(-1, 1, 1, 1) * 1e-4, state

    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([[2.0, 0.0]]).repeat(len(x), 1) + 0 * x.flatten(1)[:, :1]

    outcome = attacked(Flat(), register(Marks), images(20), eps=1, steps=3, restarts=2)
    torch.testing.assert_close(outcome.x_adv, torch.full((20, *SHAPE), 0.5 + 13e-4), rtol=0, atol=1e-6)


# --- what attacks may return ----------------------------------------------------------------------


def returning(what: Callable[[Tensor], Any], *, in_start: bool = False) -> type[Toy]:
    class Returning(Toy):
        access = "score"

        def start(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> State:
            return {"x_adv": what(x)} if in_start else {}

        def step(
            self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
        ) -> tuple[Tensor, State]:
            return x_adv if in_start else what(x_adv), state

    return Returning


class Whole(WholeAttack):
    """Base of the attacks below with a loop of their own."""

    batch_size = 8

    def perturb(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> Tensor:
        return x


def whole(what: Callable[[Tensor], Any]) -> type[Whole]:
    class Returning(Whole):
        def perturb(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> Tensor:
            result: Tensor = what(x)
            return result

    return Returning


BAD = {
    "NaN": lambda x: torch.full_like(x, torch.nan),
    "NaN in one pixel": lambda x: x.index_fill(2, torch.tensor(0), torch.nan),
    "another shape": lambda x: x[:, :, 1:],
    "too few rows": lambda x: x[:-1],
    "no tensor": lambda x: None,
}


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("kind", ["step", "start", "whole"])
def test_what_is_no_point_at_all_is_an_error_that_names_the_attack(
    register: Register, kind: str, what: str, norm: str
) -> None:
    cls: type = whole(BAD[what]) if kind == "whole" else returning(BAD[what], in_start=kind == "start")
    with pytest.raises(AttackError, match="toy_returning"):
        attacked(linear(), register(cls), images(20), eps=0.1, norm=norm)


FAR = {
    "far up": lambda x: x + 10,
    "far down": lambda x: x - 10,
    "to the other side": lambda x: 1 - x,
}


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("what", FAR)
@pytest.mark.parametrize("kind", ["step", "start", "whole"])
def test_points_outside_ball_and_box_are_brought_back(register: Register, kind: str, what: str, norm: str) -> None:
    x = images(20, 0, 1)
    cls: type = whole(FAR[what]) if kind == "whole" else returning(FAR[what], in_start=kind == "start")
    x_adv = attacked(linear(), register(cls), x, eps=0.1, norm=norm).x_adv
    distance = Threat(norm, 0.1).distance(x_adv, x)
    assert float(distance.max()) <= 0.1 + 1e-6
    assert float(distance.min()) > 0
    assert float(x_adv.min()) >= 0
    assert float(x_adv.max()) <= 1


def test_a_model_that_only_falls_outside_the_ball_is_robust(register: Register) -> None:
    x = images(20, 0.2, 0.6)
    outcome = attacked(Threshold(), register(returning(FAR["far up"])), x, eps=0.1)
    assert bool(outcome.robust.all())


# --- careless attacks -----------------------------------------------------------------------------


class Threshold(nn.Module):
    """Decides 1 as soon as a pixel is brighter than 0.75."""

    def forward(self, x: Tensor) -> Tensor:
        bright = x.flatten(1).amax(dim=1) - 0.75
        return torch.stack([-bright, bright], dim=1)


def careless(step: Callable[[Target, Tensor], Tensor], start: Callable[[Tensor], object] | None = None) -> type[Toy]:
    class Careless(Toy):
        def start(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> State:
            if start is not None:
                start(x)
            return {}

        def step(
            self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
        ) -> tuple[Tensor, State]:
            return step(target, x_adv), state

    return Careless


def evaluated_then_written(target: Target, x_adv: Tensor) -> Tensor:
    target(x_adv)
    return x_adv.add_(0.4)


def written_then_evaluated(target: Target, x_adv: Tensor) -> Tensor:
    x_adv.add_(0.4)
    target(x_adv)
    return x_adv


CARELESS = {
    "the step writes into its points": careless(lambda target, x_adv: x_adv.add_(0.4)),
    "it writes after a pass": careless(evaluated_then_written),
    "it writes before a pass": careless(written_then_evaluated),
    "the start writes into the images": careless(lambda target, x_adv: x_adv, lambda x: x.add_(0.4)),
}


@pytest.mark.parametrize("what", CARELESS)
@pytest.mark.parametrize("count", [5, 20])
def test_an_attack_that_writes_into_what_it_was_given_wins_nothing_by_it(
    register: Register, what: str, count: int
) -> None:
    x = images(count, 0.2, 0.6)
    try:
        outcome = attacked(Threshold(), register(CARELESS[what]), x, eps=0.1)
    except AttackError as error:  # refusing is as good as repairing
        assert "toy_careless" in str(error)  # noqa: PT017
        return
    assert bool(outcome.robust.all())
    assert float(Threat("linf", 0.1).distance(outcome.x_adv, x).max()) <= 0.1 + 1e-6


def test_an_attack_may_ask_for_the_gradient_of_the_very_tensor_it_was_given(register: Register) -> None:
    def step(target: Target, x_adv: Tensor) -> Tensor:
        x_adv.requires_grad_()
        gradient = torch.autograd.grad(target(x_adv)[:, 0].sum(), x_adv)[0]
        return x_adv - 0.05 * gradient.sign()

    model, x = linear(), images(37)
    outcome = attacked(model, register(careless(step)), x, eps=0.1, steps=3)
    assert not outcome.x_adv.requires_grad
    assert not bool(outcome.robust.all())
    assert outcome.forwards <= 37 * 4


def test_images_that_ask_for_a_gradient_are_attacked_like_others() -> None:
    model, x = linear(), images(20)
    plain = attacked(model, "pgd", x, eps=0.1)
    asking = x.clone().requires_grad_()
    outcome = attacked(model, "pgd", asking, eps=0.1)
    assert torch.equal(outcome.x_adv, plain.x_adv)
    assert not outcome.x_adv.requires_grad
    assert asking.grad is None


# --- state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [16, 32, 128])
def test_the_state_of_an_image_stays_with_it_when_others_are_dropped_and_refilled(
    register: Register, batch_size: int
) -> None:
    checked = []

    class Counts(Toy):
        def start(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> State:
            return {
                "count": torch.zeros_like(rng.ids),
                "image": rng.ids,
                "run": rng.run,
                "x": x,
                "label": y,
                "matrix": rng.ids.view(-1, 1, 1).expand(-1, 2, 3).float(),
            }

        def step(
            self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
        ) -> tuple[Tensor, State]:
            assert torch.equal(state["count"] + 1, rng.step)
            assert torch.equal(state["image"], rng.ids)
            assert torch.equal(state["run"], rng.run)
            assert torch.equal(state["label"], y)
            assert torch.equal(state["x"], x[rng.ids])
            assert torch.equal(state["matrix"][:, 1, 2].long(), rng.ids)
            assert "x_adv" not in state
            checked.append(len(y))
            noise = rng.uniform(*x_adv.shape[1:], low=-threat.eps, high=threat.eps)
            return x_adv + noise, {**state, "count": state["count"] + 1}

    x = images(70)
    outcome = attacked(linear(), register(Counts), x, eps=0.15, steps=5, restarts=3, batch_size=batch_size)
    assert 5 < int(outcome.robust.sum()) < 65
    assert max(checked) <= batch_size
    assert min(checked) >= 16


@pytest.mark.parametrize("value", [torch.zeros(()), torch.zeros(1, 20), 0.5], ids=["a number", "one row", "a float"])
@pytest.mark.parametrize("where", ["start", "step"])
def test_a_state_that_is_not_by_image_is_an_error_that_names_the_attack(
    register: Register, where: str, value: Any
) -> None:
    class Forgetful(Toy):
        def start(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> State:
            return {"memory": value if where == "start" else y}

        def step(
            self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
        ) -> tuple[Tensor, State]:
            return x_adv, {"memory": value}

    with pytest.raises(AttackError, match=r"toy_forgetful.*memory"):
        attacked(linear(), register(Forgetful), images(20), eps=0.1)


@pytest.mark.parametrize("batch_size", [16, 40])
def test_no_step_takes_more_rows_than_the_batch_size_even_when_claims_are_denied(
    monkeypatch: pytest.MonkeyPatch, register: Register, batch_size: int
) -> None:
    sizes = []

    class SometimesLying(Lying):
        """Lies about the images that began in the darker half."""

        def _predict(self, x: Tensor) -> Tensor:
            scores = Target._predict(self, x)
            dark = x.flatten(1).mean(dim=1, keepdim=True) < 0.5
            return torch.where(dark & self.lies, -scores, scores)

    class Watches(Toy):
        def step(
            self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
        ) -> tuple[Tensor, State]:
            sizes.append(len(y))
            return x_adv, state

    monkeypatch.setattr(ensdef.harness, "Target", SometimesLying)
    outcome = attacked(linear(), register(Watches), images(200), steps=20, batch_size=batch_size)
    assert bool(outcome.robust.all())
    assert max(sizes) <= batch_size


# --- budgets --------------------------------------------------------------------------------------


def test_a_shortest_perturbation_counts_only_within_the_radius(register: Register) -> None:
    model, x = linear(classes=2), images(40, 0.4, 0.6)
    y = decisions(model, x)

    class Shortest(Toy):
        """Steps just over the boundary, however far it is."""

        budget = "min_norm"

        def step(
            self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
        ) -> tuple[Tensor, State]:
            scores = target(x_adv).detach()
            margin = (scores.gather(1, y[:, None]) - scores.gather(1, 1 - y[:, None])).squeeze(1)
            slope = (model.weight[0] - model.weight[1]).detach().abs().sum()
            length = 1.001 * margin.clamp_min(0) / slope
            return x_adv + length.view(-1, 1, 1, 1) * away(model, y), state

    slope = (model.weight[0] - model.weight[1]).detach().abs().sum()
    scores = model(x).detach()
    needed = (scores[:, 0] - scores[:, 1]).abs() / slope * 1.001
    assert bool((needed < 0.4).all())  # the box is never felt
    eps = round(float(needed.median()), 4)
    within = needed <= eps
    assert 15 < int(within.sum()) < 25
    assert bool(((needed - eps).abs() > 1e-5).all())
    outcome = attacked(model, register(Shortest), x, y=y, eps=eps, steps=2)
    assert torch.equal(outcome.robust, ~within)
    assert torch.equal(outcome.x_adv[~within], x[~within])
    distance = Threat("linf", eps).distance(outcome.x_adv, x)
    torch.testing.assert_close(distance[within].float(), needed[within], rtol=1e-3, atol=1e-5)


def test_a_shortest_perturbation_is_not_projected_onto_the_ball_on_its_way(register: Register) -> None:
    seen = []

    class Far(Toy):
        budget = "min_norm"

        def step(
            self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
        ) -> tuple[Tensor, State]:
            seen.append(x_adv)
            return x_adv + 0.15, state

    x = images(16, 0.4, 0.8)
    attacked(linear(), register(Far), x, y=decisions(linear(), x), eps=0.001, steps=4, success="last")
    torch.testing.assert_close(seen[-1], (x + 0.45).clamp(0, 1))


class Negative(Toy):
    """The photographic negative: no ball at all."""

    budget: ClassVar[Any] = "none"
    norms = ()
    random = False

    def step(
        self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
    ) -> tuple[Tensor, State]:
        assert threat.norm is None
        return 1 - x_adv, state


def test_an_attack_without_a_budget_has_no_norm_no_radius_and_no_ball(register: Register) -> None:
    x = images(30, 0, 1)
    name = register(Negative)
    spec = AttackSpec.create(name, {"steps": 1}, "linf", "8/255")
    assert (spec.norm, spec.eps, spec.eps_value, spec.written) == (None, None, None, None)
    outcome = attacked(linear(), name, x, steps=1, success="last")
    torch.testing.assert_close(outcome.x_adv, 1 - x)
    assert 0 < int(outcome.robust.sum()) < 30
    record = evaluate(linear(), x, decisions(linear(), x), attack=name, steps=1)
    assert (record.norm, record.eps, record.eps_value) == (None, None, None)


def test_without_a_budget_the_box_still_holds(register: Register) -> None:
    class Over(Negative):
        def step(
            self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
        ) -> tuple[Tensor, State]:
            return x_adv * 5 - 1, state

    x_adv = attacked(linear(), register(Over), images(30), steps=2).x_adv
    assert float(x_adv.min()) == 0
    assert float(x_adv.max()) == 1


def test_an_attack_is_refused_at_a_norm_it_does_not_have(register: Register) -> None:
    class OnlyFlat(Toy):
        norms = ("linf",)

    with pytest.raises(UsageError, match=r"toy_onlyflat cannot be run in l2; it has: linf"):
        attacked(linear(), register(OnlyFlat), images(4), norm="l2")


# --- attacks with a loop of their own -------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [16, 64])
def test_a_whole_attack_gets_the_right_images_in_order_in_batches_of_its_own_size(
    register: Register, batch_size: int
) -> None:
    given: list[Tensor] = []

    class Watches(Whole):
        def perturb(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> Tensor:
            given.append(rng.ids)
            assert torch.equal(x, images(30)[rng.ids])
            assert torch.equal(y, decisions(model, x))
            return x

    model, x = linear(), images(30)
    y = decisions(model, x)
    y[4] = (y[4] + 1) % CLASSES
    attacked(model, register(Watches), x, y=y, batch_size=batch_size)
    assert [len(part) for part in given] == [8, 8, 8, 5]
    assert torch.cat(given).tolist() == [index for index in range(30) if index != 4]


def test_a_whole_attack_that_seeds_and_draws_leaves_the_global_state_where_it_was(register: Register) -> None:
    class Noisy(Whole):
        def perturb(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> Tensor:
            torch.manual_seed(3)
            return x + threat.eps * torch.rand_like(x)

    before = torch.random.get_rng_state()
    attacked(linear(), register(Noisy), images(20), eps=0.1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_passes_of_a_whole_attack_are_counted_and_its_successes_judged(register: Register) -> None:
    model, x = linear(classes=2), images(20)

    class Knows(Whole):
        def perturb(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> Tensor:
            point = x.clone().requires_grad_()
            gradient = torch.autograd.grad(nn.functional.cross_entropy(target(point), y, reduction="sum"), point)[0]
            return x + threat.eps * gradient.sign()

    for eps in (NOTHING, 0.6):
        outcome = attacked(model, register(Knows), x, eps=eps)
        assert bool(outcome.robust.all()) == (eps == NOTHING)
        assert (outcome.forwards, outcome.backwards) == (20 * 2, 20)


# --- models that misbehave ------------------------------------------------------------------------


class Edge(nn.Module):
    """Right everywhere, but NaN where the first pixel is above 0.55, as a careless logarithm would be."""

    def __init__(self, label: int = 0) -> None:
        super().__init__()
        self.label = label

    def forward(self, x: Tensor) -> Tensor:
        first = x.flatten(1)[:, 0]
        scores = torch.zeros(len(x), 2, device=x.device)
        scores[:, self.label] = 1.0
        return scores + torch.sqrt(0.55 - first)[:, None]


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("when", ["on the way", "at the end"])
def test_a_model_that_returns_nan_under_attack_is_fooled(register: Register, label: int, when: str) -> None:
    class Upwards(Toy):
        def step(
            self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
        ) -> tuple[Tensor, State]:
            up = rng.step < 4 if when == "on the way" else rng.step == 4
            moved = torch.where(up.view(-1, 1, 1, 1), torch.full_like(x_adv, 0.6), torch.full_like(x_adv, 0.5))
            return moved, state

    x = torch.full((20, *SHAPE), 0.5)
    y = torch.full((20,), label)
    outcome = attacked(Edge(label), register(Upwards), x, y=y, eps=0.2, steps=4)
    assert bool(outcome.clean.all())
    assert not bool(outcome.robust.any())
    assert outcome.nonfinite == 20
    assert outcome.unconfirmed == 0


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["pgd", "mim", "fgsm"])
def test_a_model_that_returns_nan_is_flagged_and_not_blamed_on_the_attack(name: str, norm: str, label: int) -> None:
    x = torch.full((40, *SHAPE), 0.5)
    y = torch.full((40,), label)
    eps = 0.3 if norm == "linf" else 1.5
    given = {"random_start": True, "steps": 3}
    record = evaluate(Edge(label), x, y, attack=name, norm=norm, eps=eps, device="cpu", **given)
    assert record.clean_accuracy == 1
    assert record.robust_accuracy is not None
    assert record.robust_accuracy < 0.8
    flag = next(flag for flag in record.flags if flag["flag"] == "nonfinite")
    assert flag["severity"] == "masking"
    assert flag["value"] == pytest.approx(1 - record.robust_accuracy)


def test_a_model_that_is_sound_has_no_flags() -> None:
    x = images(400)
    assert evaluate(linear(), x, decisions(linear(), x), eps=0.1, steps=3, device="cpu").flags == []


class Random(nn.Module):
    """A linear model under heavy noise."""

    def __init__(self) -> None:
        super().__init__()
        self.model = linear(classes=2)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.model(x)
        return scores + 50 * torch.randn_like(scores)


def test_a_model_that_answers_at_random_is_flagged() -> None:
    x = images(100)
    record = evaluate(Random(), x, decisions(linear(classes=2), x), attack="fgsm", eps=0.01, device="cpu")
    flag = next(flag for flag in record.flags if flag["flag"] == "recount")
    assert flag["severity"] == "masking"
    assert flag["value"] > 0.1
    assert all(one <= other for one, other in zip(record.outcomes["robust"], record.outcomes["clean"], strict=True))
    assert "batch" in flag["meaning"]


def test_a_model_whose_answer_depends_on_the_batch_is_flagged(register: Register) -> None:
    class Sized(nn.Module):
        """Always 0, except that batches of exactly 16 that were moved are answered with 1."""

        def forward(self, x: Tensor) -> Tensor:
            wrong = (x.flatten(1)[:, 0] > 0.5) & (len(x) == 16)
            return torch.stack([~wrong, wrong], dim=1).float() * 3

    x = torch.full((16, *SHAPE), 0.5)
    name = register(returning(lambda x: x + 0.1))
    outcome = attacked(Sized(), name, x, eps=0.1, batch_size=16)
    assert outcome.unconfirmed == 0  # 16 // 2 + 3 is below the smallest batch, so the recount has 16 rows too
    outcome = attacked(Sized(), name, x, eps=0.1, batch_size=32)
    assert outcome.unconfirmed + int(outcome.robust.sum()) in (0, 32)


class Says(nn.Module):
    """Answers whatever a function of the images and their plain scores says."""

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.answer = answer
        self.model = linear()

    def forward(self, x: Tensor) -> Any:
        return self.answer(self.model(x))


REFUSED = {
    "probabilities": (lambda scores: scores.softmax(dim=1), "probabilities"),
    "NaN": (lambda scores: scores * torch.nan, "NaN"),
    "infinity": (lambda scores: scores - torch.inf, "infinite"),
    "NaN for one image": (lambda scores: scores.index_fill(0, torch.tensor(len(scores) - 1), torch.nan), "NaN"),
    "one score an image": (lambda scores: scores[:, :1], "expected log-scores of shape"),
    "labels": (lambda scores: scores.argmax(dim=1), "expected log-scores of shape"),
    "maps": (lambda scores: scores[:, :, None, None], "expected log-scores of shape"),
    "too few rows": (lambda scores: scores[1:], "expected log-scores of shape"),
    "a pair": (lambda scores: (scores, scores), "tuple"),
    "nothing": (lambda scores: None, "NoneType"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("count", [1, 20])
def test_a_model_that_answers_something_else_than_log_scores_is_refused(what: str, count: int) -> None:
    answer, says = REFUSED[what]
    with pytest.raises(PluginError, match=says):
        attacked(Says(answer), "pgd", images(count), y=decisions(linear(), images(count)), eps=0.1)


def test_log_probabilities_are_welcome() -> None:
    x = images(20)
    y = decisions(linear(), x)
    logits = attacked(linear(), "pgd", x, y=y, eps=0.06, loss="margin")
    logs = attacked(Says(lambda scores: scores.log_softmax(dim=1)), "pgd", x, y=y, eps=0.06, loss="margin")
    assert torch.equal(logits.robust, logs.robust)


# --- views and combiners --------------------------------------------------------------------------


def lopsided() -> Mean:
    """A member sure of itself and one barely sure: mean logit and mean probability follow different members."""
    sure, unsure = linear(0, classes=3), linear(1, classes=3)
    with torch.no_grad():
        sure.weight.mul_(4)
        unsure.weight.mul_(0.5)
    return Mean([sure, unsure])


@pytest.mark.parametrize("view", ["mean_logit", "mean_probability", "member0", "member1", "predict"])
def test_a_gradient_attack_follows_the_view_it_is_told_to(view: str) -> None:
    model, x = lopsided(), images(30)
    y = decisions(model, x)
    point = x.clone().requires_grad_()
    logits = torch.stack([member(point) for member in model.members])
    scores = {
        "mean_logit": logits.mean(dim=0),
        "mean_probability": logits.softmax(dim=2).mean(dim=0).log(),
        "predict": logits.softmax(dim=2).mean(dim=0).log(),
        "member0": logits[0],
        "member1": logits[1],
    }[view]
    gradient = torch.autograd.grad(nn.functional.cross_entropy(scores, y, reduction="sum"), point)[0]
    x_adv = attacked(model, "fgsm", x, y=y, eps=0.01, view=view, success="last").x_adv
    assert float((x_adv != (x + 0.01 * gradient.sign())).float().mean()) < 1  # not vacuous: floats were compared
    torch.testing.assert_close(x_adv, x + 0.01 * gradient.sign(), rtol=0, atol=3e-7)


def test_whatever_view_is_followed_success_is_judged_on_predict() -> None:
    model, x = lopsided(), images(60)
    y = decisions(model, x)
    robust = {}
    for view in ("predict", "member1"):
        outcome = attacked(model, "pgd", x, y=y, eps=0.04, view=view, steps=5)
        assert torch.equal(decisions(model, outcome.x_adv) == y, outcome.robust)
        robust[view] = int(outcome.robust.sum())
    assert robust["predict"] < robust["member1"]


@pytest.mark.parametrize(
    ("make", "known"), [(lopsided, "predict, mean_probability, mean_logit, member0, member1"), (linear, "predict")]
)
def test_an_unknown_view_is_an_error_that_lists_the_views(make: Callable[[], nn.Module], known: str) -> None:
    with pytest.raises(UsageError, match=f"no view 'mean_lgoit'; it has: {known}"):
        attacked(make(), "pgd", images(4), eps=0.1, view="mean_lgoit")


@pytest.mark.parametrize("combiner", combine.COMBINERS)
def test_a_combiner_replaces_the_rule_of_a_defence(combiner: str) -> None:
    class Opposite(Mean):
        """Chooses what its members like least."""

        def predict(self, x: Tensor) -> Tensor:
            return -super().predict(x)

    model, x = Opposite([linear(seed) for seed in range(3)]), images(60)
    rule = combine.COMBINERS[combiner]
    with torch.no_grad():
        y = rule(model.member_logits(x)).argmax(dim=1)
    native = attacked(model, "pgd", x, y=y, eps=0.02, steps=3)
    assert float(native.clean.float().mean()) < 0.5
    outcome = attacked(model, "pgd", x, y=y, eps=0.02, steps=3, combiner=combiner)
    assert bool(outcome.clean.all())
    with torch.no_grad():
        after = rule(model.member_logits(outcome.x_adv)).argmax(dim=1) == y
    assert torch.equal(after, outcome.robust)
    assert 0 < int(outcome.robust.sum()) < 60


# --- devices --------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")
def test_a_model_attacked_on_the_gpu_stays_where_its_owner_put_it() -> None:
    model, x = ensemble(), images(40)
    spec = AttackSpec.create("pgd", {"steps": 4}, "linf", 0.06)
    here = attack_model(model, x, decisions(model, x), spec)
    there = attack_model(model, x, decisions(model, x), spec, device="cuda")
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert there.x_adv.device.type == there.robust.device.type == "cpu"
    assert int((here.robust != there.robust).sum()) <= 1
    assert (here.clean == there.clean).all()


@pytest.mark.parametrize("name", ["deepfool", "spsa"])
def test_an_attack_that_lives_on_small_differences_searches_in_fp32_whatever_is_asked_for(name: str) -> None:
    specs = [AttackSpec.create(name, {}, "linf", "0.1", search=search) for search in ("fp32", "bf16", "bf16+fp32")]
    assert [spec.search for spec in specs] == ["fp32"] * 3
    assert AttackSpec.create("pgd", {}, "linf", "0.1", search="bf16").search == "bf16"
