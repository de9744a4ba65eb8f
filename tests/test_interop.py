"""Other people's attack libraries, with nothing of ours around the model, and ours against theirs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ensdef
from ensdef.attack_spec import AttackSpec
from ensdef.checkpoints import save_checkpoint
from ensdef.harness import Outcome, attack_model
from ensdef.specs import DataSpec, Setting, TrainSpec

CLASSES, SHAPE = 4, (1, 8, 8)
EPS = 0.06
#: A radius at which the trained toys lose a good part of their images.
LARGE = 0.12


def prototypes() -> Tensor:
    """One smooth picture a class."""
    coarse = torch.rand(CLASSES, 1, 3, 3, generator=torch.Generator().manual_seed(4))
    return nn.functional.interpolate(coarse, size=(8, 8), mode="bilinear")


def data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy pictures and their classes."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (count,), generator=generator)
    return (prototypes()[y] + 0.15 * torch.randn(count, *SHAPE, generator=generator)).clamp(0, 1), y


def fit(model: nn.Module, steps: int, eps: float) -> nn.Module:
    """A few steps of training on single-step adversarial examples from a random start."""
    x, y = data(512, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.train()
        for step in range(steps):
            rows = torch.arange(64) + 64 * (step % 8)
            point = (x[rows] + eps * (2 * torch.rand_like(x[rows]) - 1)).clamp(0, 1).requires_grad_()
            gradient = torch.autograd.grad(nn.functional.cross_entropy(model(point), y[rows]), point)[0]
            moved = x[rows] + (point.detach() + eps * gradient.sign() - x[rows]).clamp(-eps, eps)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(moved.clamp(0, 1)), y[rows]).backward()
            optimizer.step()
    for parameter in model.parameters():
        parameter.grad = None
    return model.eval()


@cache
def small_net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        network = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, stride=2, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12 * 16, CLASSES),
        )
    return fit(network, 40, EPS)


@cache
def defence(method: str = "nat") -> ensdef.EnsembleDefense:
    made = ensdef.create_defense(method, architecture="small_resnet", members=2, num_classes=CLASSES, image_shape=SHAPE)
    fit(made, 40, EPS)
    return made


MODELS: dict[str, Callable[[], nn.Module]] = {"small net": small_net, "nat": defence, "soe": lambda: defence("soe")}
every_model = pytest.mark.parametrize("name", MODELS)


def ours(model: nn.Module, name: str, x: Tensor, y: Tensor, eps: float, norm: str = "linf", **params: Any) -> Outcome:
    return attack_model(model, x, y, AttackSpec.create(name, params, norm, eps), batch_size=64)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(dim=1) == y).float().mean())


def agree(outcome: Outcome, theirs: Tensor, x: Tensor, step: float) -> None:
    """Equal points, but for pixels whose gradient is zero to rounding, where signs may differ; there are few.

    Images that were wrong already are not attacked by us.
    """
    attacked = outcome.clean
    assert int(attacked.sum()) > len(x) // 2
    assert not torch.equal(theirs[attacked], x[attacked])
    difference = (outcome.x_adv - theirs)[attacked].abs()
    assert float((difference > 2e-6).float().mean()) < 2e-3
    assert float(difference.max()) <= 2 * step * 10 + 1e-6


# --- torchattacks ---------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("eps", [0.03, 0.1])
def test_our_pgd_without_noise_gives_the_points_of_torchattacks(name: str, eps: float) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    model, (x, y) = MODELS[name](), data(48, seed=2)
    theirs = torchattacks.PGD(model, eps=eps, alpha=eps / 4, steps=6, random_start=False)(x, y)
    outcome = ours(model, "pgd", x, y, eps, steps=6, step_size="eps/4", random_start=False, success="last")
    agree(outcome, theirs, x, eps / 4)
    assert float((accuracy(model, theirs, y) - outcome.robust.float().mean()).abs()) < 1e-6


@every_model
def test_our_bim_gives_the_points_of_torchattacks(name: str) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    model, (x, y) = MODELS[name](), data(48, seed=2)
    theirs = torchattacks.BIM(model, eps=EPS, alpha=EPS / 4, steps=6)(x, y)
    agree(ours(model, "bim", x, y, EPS, steps=6, step_size="eps/4", success="last"), theirs, x, EPS / 4)


@every_model
def test_our_fgsm_gives_the_points_of_torchattacks(name: str) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    model, (x, y) = MODELS[name](), data(48, seed=2)
    theirs = torchattacks.FGSM(model, eps=EPS)(x, y)
    agree(ours(model, "fgsm", x, y, EPS, success="last"), theirs, x, EPS)


@every_model
@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_our_mim_gives_the_points_of_torchattacks(name: str, decay: float) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    model, (x, y) = MODELS[name](), data(48, seed=2)
    theirs = torchattacks.MIFGSM(model, eps=EPS, alpha=EPS / 4, steps=6, decay=decay)(x, y)
    outcome = ours(model, "mim", x, y, EPS, steps=6, step_size="eps/4", decay=decay, success="last")
    agree(outcome, theirs, x, EPS / 4)


@every_model
def test_our_pgd_in_l2_gives_the_points_of_torchattacks(name: str) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    model, (x, y) = MODELS[name](), data(48, seed=2)
    theirs = torchattacks.PGDL2(model, eps=0.5, alpha=0.125, steps=6, random_start=False)(x, y)
    outcome = ours(model, "pgd", x, y, 0.5, "l2", steps=6, step_size="eps/4", random_start=False, success="last")
    attacked = outcome.clean
    assert not torch.equal(theirs[attacked], x[attacked])
    torch.testing.assert_close(outcome.x_adv[attacked], theirs[attacked], rtol=0, atol=1e-4)


def test_success_at_any_iterate_is_never_weaker_than_torchattacks() -> None:
    torchattacks = pytest.importorskip("torchattacks")
    model, (x, y) = defence(), data(96, seed=3)
    theirs = torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=6, random_start=False)(x, y)
    outcome = ours(model, "pgd", x, y, EPS, steps=6, step_size="eps/4", random_start=False)
    with torch.no_grad():
        kept = model(theirs).argmax(dim=1) == y
    assert not bool((outcome.robust & ~kept).any())


# --- foolbox --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["nat", "soe"])
def test_foolbox_attacks_a_defence_as_it_is_and_finds_what_we_find(method: str) -> None:
    foolbox = pytest.importorskip("foolbox")
    model, (x, y) = defence(method), data(250, seed=5)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(steps=10, rel_stepsize=0.2, random_start=False)
    _, _, success = attack(wrapped, x, y, epsilons=LARGE)
    theirs = 1 - float(success.float().mean())
    given: dict[str, Any] = {"attack": "pgd", "eps": LARGE, "steps": 10, "random_start": False, "device": "cpu"}
    record = ensdef.evaluate(model, x, y, success="last", **given)
    assert record.clean_accuracy is not None
    assert record.robust_accuracy is not None
    assert 0.1 < record.robust_accuracy < record.clean_accuracy - 0.05
    assert abs(theirs - record.robust_accuracy) < 0.01
    strict = ensdef.evaluate(model, x, y, **given).robust_accuracy
    assert strict is not None
    assert strict <= theirs + 0.005


# --- AutoAttack -----------------------------------------------------------------------------------


def trained_spec(method: str) -> TrainSpec:
    source = DataSpec("digits", None, None, None, "0" * 16, "1" * 16, SHAPE, CLASSES, (0.5,), (0.25,))
    return TrainSpec.create(method, {}, Setting(source, "small_resnet", 2, "linf", "0.1"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["nat", "soe"])
def test_autoattack_runs_on_a_loaded_checkpoint_with_nothing_of_ours_around_it(method: str, tmp_path: Path) -> None:
    pyautoattack = pytest.importorskip("pyautoattack")
    save_checkpoint(tmp_path / "model", defence(method), trained_spec(method), {})
    model = ensdef.load_checkpoint(tmp_path / "model")
    assert not model.training
    x, y = data(40, seed=6)
    with torch.no_grad():
        assert torch.equal(model(x), defence(method)(x))
    attack = pyautoattack.AutoAttack(
        model, norm="Linf", eps=LARGE, seed=0, version="custom", attacks=["apgd-ce", "apgd-t", "fab-t", "square"]
    )
    attack.apgd.n_iter = attack.apgd_targeted.n_iter = attack.fab.n_iter = 5
    attack.apgd.n_restarts = attack.apgd_targeted.n_restarts = attack.fab.n_restarts = 1
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = CLASSES - 1
    attack.square.n_queries = 20
    x_adv = attack.run_standard_evaluation(x, y, batch_size=20)
    x_adv = x_adv[0] if isinstance(x_adv, tuple) else x_adv
    assert float((x_adv - x).abs().max()) <= LARGE + 1e-6
    assert float(x_adv.min()) >= 0
    assert float(x_adv.max()) <= 1
    assert 0 < accuracy(model, x_adv, y) < accuracy(model, x, y)


def test_a_model_is_an_ordinary_module_to_others() -> None:
    for model in (defence(), defence("soe")):
        assert isinstance(model, nn.Module)
        assert len(list(model.parameters())) > 0
        x, _ = data(5, seed=7)
        x.requires_grad_()
        scores = model(x)
        assert scores.shape == (5, CLASSES)
        assert torch.autograd.grad(scores.sum(), x)[0].is_contiguous()
