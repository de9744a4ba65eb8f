"""XOR with two linear experts, iGAT's two points, and the numbers of its theorem."""

from __future__ import annotations

import math

import pytest
import torch
from toys_defense import generator

from ensdef import combine
from ensdef.diagnostics import (
    igat_risk_pair,
    igat_risk_single,
    igat_toy_risks,
    xor_bayes_accuracy,
    xor_data,
    xor_experiment,
    xor_oracle_mse,
)
from ensdef.diagnostics.synthetic import IGAT_TOY, fit_experts, least_squares, oracle_mse
from ensdef.errors import UsageError

# --- the data -------------------------------------------------------------------------------------


def test_the_four_corners_are_labelled_by_the_product_of_their_signs() -> None:
    x, y = xor_data(4000, 0.0, generator())
    assert torch.equal(x.abs(), torch.ones_like(x))
    assert torch.equal(y, x[:, 0] * x[:, 1])
    corners = torch.tensor([[a, b] for a in (-1.0, 1.0) for b in (-1.0, 1.0)])
    shares = [float((x == corner).all(dim=1).double().mean()) for corner in corners]
    assert shares == pytest.approx([0.25] * 4, abs=0.03)


@pytest.mark.parametrize("variance", [0.1, 0.01])
def test_the_noise_has_the_variance_asked_for(variance: float) -> None:
    x, y = xor_data(20_000, variance, generator())
    clean, labels = xor_data(20_000, 0.0, generator())
    assert torch.equal(y, labels)
    assert (x - clean).var(dim=0).tolist() == pytest.approx([variance] * 2, rel=0.05)


# --- what can be known without training -----------------------------------------------------------


@pytest.mark.parametrize(("variance", "expected"), [(0.1, 0.0909), (0.01, 0.0099)])
def test_the_oracle_error_is_that_of_two_opposite_experts_on_their_half_planes(
    variance: float, expected: float
) -> None:
    assert xor_oracle_mse(variance) == pytest.approx(expected, abs=5e-5)
    x, y = xor_data(200_000, variance, generator())
    corners, _ = xor_data(200_000, 0.0, generator())
    errors = [float((slope * x[:, 0] * corners[:, 1] - y).square().mean()) for slope in (0.8, 1 / (1 + variance), 1.1)]
    assert errors[1] == pytest.approx(expected, rel=0.01)
    assert min(errors) == errors[1]


@pytest.mark.parametrize(("variance", "expected"), [(0.1, 0.99844), (0.01, 1.0), (0.5, 0.85507)])
def test_the_best_accuracy_is_that_of_the_sign_of_the_product(variance: float, expected: float) -> None:
    assert xor_bayes_accuracy(variance) == pytest.approx(expected, abs=5e-6)
    x, y = xor_data(100_000, variance, generator())
    assert float((x.prod(dim=1).sign() == y).double().mean()) == pytest.approx(expected, abs=4e-3)


def test_two_constants_have_no_oracle_error_and_know_nothing() -> None:
    """The minimum may use the label: the degenerate optimum that trained biases allow."""
    _, y = xor_data(50, 0.1, generator())
    constants = torch.tensor([[1.0], [-1.0]]).expand(2, 50)
    assert oracle_mse(constants, y) == 0.0
    assert float((constants.mean(dim=0) - y).square().mean()) == 1.0


@pytest.mark.parametrize("with_bias", [True, False])
def test_least_squares_solves_the_normal_equations(with_bias: bool) -> None:
    x, y = xor_data(100, 0.1, generator())
    slope, offset = least_squares(x, y, with_bias)
    residual = x @ slope + offset - y
    assert (x.T @ residual).tolist() == pytest.approx([0.0] * 2, abs=1e-4)
    assert (abs(float(residual.sum())) < 1e-4) == with_bias
    assert (float(offset) == 0.0) != with_bias


def test_one_step_of_training_follows_the_soft_minimum_s_responsibilities() -> None:
    x, y = (part.double() for part in xor_data(30, 0.1, generator()))
    slopes = torch.randn(2, 2, generator=generator(1)).double()
    biases = torch.tensor([0.3, -0.2]).double()
    experts = fit_experts(x, y, slopes, biases, 0.5, steps=1, lr=0.1)
    values = slopes @ x.T + biases[:, None]
    shares = (-(values - y).square() / 0.5).softmax(dim=0)
    slope_step = (shares * 2 * (values - y)) @ x / len(y)
    torch.testing.assert_close(experts.slopes, slopes - 0.1 * slope_step)
    torch.testing.assert_close(experts.biases, biases - 0.1 * (shares * 2 * (values - y)).mean(dim=1))
    best = (values - y).square().argmin(dim=0)
    target = torch.stack([best == 0, best == 1]).double()
    torch.testing.assert_close(experts.gate_slopes, -0.1 * (0.5 - target) @ x / (2 * len(y)))
    torch.testing.assert_close(experts.gate_biases, -0.1 * (0.5 - target).mean(dim=1) / 2)


# --- the experiment -------------------------------------------------------------------------------


def test_two_experts_solve_xor_where_their_average_cannot() -> None:
    result = xor_experiment(seed=0, variance=0.1, sigma=0.1, bias="none")
    assert result.oracle_mse == pytest.approx(0.091, abs=0.006)
    assert result.accuracy == pytest.approx(0.998, abs=0.003)
    assert result.averaged_mse == pytest.approx(1.0, abs=0.01)
    assert result.averaged_accuracy == pytest.approx(0.5, abs=0.06)


def test_a_large_temperature_merges_the_experts_into_the_average() -> None:
    result = xor_experiment(seed=0, variance=0.1, sigma=3.0, count=1000, steps=500)
    assert result.oracle_mse == pytest.approx(result.averaged_mse, abs=0.02)
    assert result.oracle_mse == pytest.approx(1.0, abs=0.02)
    assert result.accuracy == pytest.approx(0.5, abs=0.06)


def test_less_noise_leaves_less_error() -> None:
    result = xor_experiment(seed=0, variance=0.01, sigma=0.1, bias="zero", count=500, steps=1000)
    assert result.oracle_mse == pytest.approx(0.013, abs=0.004)
    assert result.accuracy == 1.0


def test_identical_experts_never_separate() -> None:
    x, y = (part.double() for part in xor_data(500, 0.1, generator()))
    start = torch.tensor([[0.7, -0.4]]).double().expand(2, 2)
    experts = fit_experts(x, y, start, torch.zeros(2).double(), 0.1, steps=500)
    values = experts.predict(x)
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-6)
    assert oracle_mse(values, y) == pytest.approx(1.0, abs=0.02)


def test_the_seed_decides_everything() -> None:
    first, again, other = (xor_experiment(seed, count=50, steps=5) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_an_unknown_bias_is_refused() -> None:
    with pytest.raises(UsageError, match="bias is 'random'; expected none, zero or normal"):
        xor_experiment(bias="random")  # type: ignore[arg-type]


# --- iGAT -----------------------------------------------------------------------------------------


def test_the_two_point_example_has_the_published_risks() -> None:
    assert igat_toy_risks() == {"single": 0.5, "max": 0.0, "avg": 0.0}


def test_the_two_point_example_combines_as_published() -> None:
    logits = IGAT_TOY.log()
    assert combine.mean_of_probabilities(logits).exp().flatten().tolist() == pytest.approx([0.635, 0.365, 0.375, 0.625])
    assert combine.max_probability(logits).exp().flatten().tolist() == pytest.approx([0.90, 0.63, 0.64, 0.89])


def test_two_models_beat_one_from_the_crossing_on() -> None:
    assert igat_risk_single(0.425) == pytest.approx(0.66531, abs=5e-6)
    assert igat_risk_pair(0.425) == pytest.approx(0.66395, abs=5e-6)
    assert (igat_risk_single(1), igat_risk_pair(1)) == (0.5, 0.25)
    assert (igat_risk_single(0), igat_risk_pair(0)) == (1.0, 1.0)
    crossing = 1 - 1 / math.sqrt(3)
    assert crossing == pytest.approx(0.42265, abs=5e-6)
    assert igat_risk_single(crossing) == pytest.approx(igat_risk_pair(crossing), abs=1e-12)
    for p in (0.1, 0.3, 0.42):
        assert igat_risk_pair(p) > igat_risk_single(p)
    for p in (0.425, 0.6, 1.0):
        assert igat_risk_pair(p) < igat_risk_single(p)
