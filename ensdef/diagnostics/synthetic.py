"""Experiments small enough to be solved on paper.

XOR: Synergy-of-Experts (Cui et al., NeurIPS 2022), appendix 3.1, and its earlier version CDA2, section 4.2: two linear
experts against a linear average. Two points and two risks: iGAT (Deng, Mu; NeurIPS 2023, arXiv:2310.18477), supplement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ensdef import combine
from ensdef.errors import UsageError
from ensdef.losses import soft_minimum


def xor_data(count: int, variance: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points around (+-1, +-1), (count, 2), and the product of the two signs, (count,) in {-1, +1}.

    Args:
        variance: of the isotropic Gaussian at each corner. The papers write 0.1 I as a covariance and call it sigma.
        rng: CPU generator.
    """
    corners = 2.0 * torch.randint(2, (count, 2), generator=rng) - 1
    return corners + math.sqrt(variance) * torch.randn(count, 2, generator=rng), corners.prod(dim=1)


@dataclass(frozen=True)
class LinearExperts:
    """K linear functions of two inputs and a linear gate.

    Args:
        slopes, biases: of the members, (K, 2) and (K,).
        gate_slopes, gate_biases: of the logits that the member is the best one, (K, 2) and (K,).
    """

    slopes: Tensor
    biases: Tensor
    gate_slopes: Tensor
    gate_biases: Tensor

    def predict(self, x: Tensor) -> Tensor:
        """Every member's value, (N, 2) -> (K, N)."""
        return self.slopes @ x.T + self.biases[:, None]

    def choose(self, x: Tensor) -> Tensor:
        """The member with the largest gate, (N, 2) -> (N,)."""
        return (self.gate_slopes @ x.T + self.gate_biases[:, None]).argmax(dim=0)


@dataclass(frozen=True)
class XorResult:
    """What two experts and one average make of fresh XOR points.

    Args:
        oracle_mse: mean of the smaller squared error of the two members; choosing may use the label.
        accuracy: sign accuracy of the member that the gate chooses, in [0, 1].
        averaged_mse, averaged_accuracy: of the average of two linear members, which is one linear function, at its
            least squares optimum.
    """

    oracle_mse: float
    accuracy: float
    averaged_mse: float
    averaged_accuracy: float


@dataclass(frozen=True)
class XorRun:
    """Two trained experts with their gate, the average beside them, and the fresh points that both are judged on.

    Args:
        slope, offset: of the average, (2,) and ().
        x, y: fresh points, (N, 2), and labels, (N,) in {-1, +1}.
    """

    experts: LinearExperts
    slope: Tensor
    offset: Tensor
    x: Tensor
    y: Tensor

    def answer(self, x: Tensor) -> Tensor:
        """Value of the member that the gate chooses, (N, 2) -> (N,)."""
        return self.experts.predict(x).gather(0, self.experts.choose(x)[None])[0]

    def average(self, x: Tensor) -> Tensor:
        """Value of the average, (N, 2) -> (N,)."""
        return x @ self.slope + self.offset

    def result(self) -> XorResult:
        """Errors and accuracies on the fresh points."""
        average = self.average(self.x)
        return XorResult(
            oracle_mse(self.experts.predict(self.x), self.y),
            float((self.answer(self.x).sign() == self.y).double().mean()),
            float((average - self.y).square().mean()),
            float((average.sign() == self.y).double().mean()),
        )


def xor_run(
    seed: int = 0,
    *,
    variance: float = 0.1,
    sigma: float = 0.1,
    bias: Literal["none", "zero", "normal"] = "none",
    count: int = 2000,
    steps: int = 1500,
    lr: float = 0.1,
) -> XorRun:
    """Train two experts by soft minimum and a gate beside them; judge both on ``count`` fresh points.

    The papers print a figure and no setting; these settings are ours. Trained biases allow the degenerate optimum
    f1 = +1, f2 = -1, whose oracle error is 0 and whose gate would have to solve XOR alone.

    Args:
        seed: of points and initial weights; slopes start from N(0, 1).
        variance: of the points, see :func:`xor_data`.
        sigma: temperature of the soft minimum.
        bias: ``"none"``, or trained from ``"zero"`` or from ``"normal"`` N(0, 1).
        count: training points, and test points.
        steps, lr: full-batch gradient descent.
    """
    if bias not in ("none", "zero", "normal"):
        raise UsageError(f"bias is {bias!r}; expected none, zero or normal")
    rng = torch.Generator().manual_seed(seed)
    x, y = xor_data(count, variance, rng)
    fresh, labels = xor_data(count, variance, rng)
    slopes = torch.randn(2, 2, generator=rng)
    biases = torch.randn(2, generator=rng) if bias == "normal" else torch.zeros(2)
    experts = fit_experts(x, y, slopes, biases, sigma, train_biases=bias != "none", steps=steps, lr=lr)
    return XorRun(experts, *least_squares(x, y, with_bias=bias != "none"), fresh, labels)


def xor_experiment(
    seed: int = 0,
    *,
    variance: float = 0.1,
    sigma: float = 0.1,
    bias: Literal["none", "zero", "normal"] = "none",
    count: int = 2000,
    steps: int = 1500,
    lr: float = 0.1,
) -> XorResult:
    """What becomes of :func:`xor_run`."""
    return xor_run(seed, variance=variance, sigma=sigma, bias=bias, count=count, steps=steps, lr=lr).result()


def fit_experts(
    x: Tensor,
    y: Tensor,
    slopes: Tensor,
    biases: Tensor,
    sigma: float,
    *,
    train_biases: bool = True,
    steps: int = 1500,
    lr: float = 0.1,
) -> LinearExperts:
    """Members minimise the soft minimum of their squared errors (CDA2, Eq. 8), the gate predicts which is smaller.

    Args:
        x, y: points, (N, 2), and values, (N,).
        slopes, biases: where the members start, (K, 2) and (K,); the gate starts at 0.
        sigma: temperature.
        train_biases: False keeps the biases as given.
        steps, lr: full-batch gradient descent on both losses at once; the gate's target has no gradient.
    """
    experts = LinearExperts(slopes.clone(), biases.clone(), torch.zeros_like(slopes), torch.zeros_like(biases))
    moving = [experts.slopes, experts.gate_slopes, experts.gate_biases, *([experts.biases] if train_biases else [])]
    for parameter in moving:
        parameter.requires_grad_()
    for _ in range(steps):
        errors = (experts.predict(x) - y).square()
        best = F.one_hot(errors.argmin(dim=0), len(slopes)).T.to(x.dtype)
        gate = experts.gate_slopes @ x.T + experts.gate_biases[:, None]
        loss = soft_minimum(errors, sigma).mean() + F.binary_cross_entropy_with_logits(gate, best)
        gradients = torch.autograd.grad(loss, moving)
        with torch.no_grad():
            for parameter, gradient in zip(moving, gradients, strict=True):
                parameter -= lr * gradient
    for parameter in moving:
        parameter.requires_grad_(False)
    return experts


def least_squares(x: Tensor, y: Tensor, with_bias: bool = True) -> tuple[Tensor, Tensor]:
    """Slope (2,) and bias () of the linear function of least squared error, from (N, 2) and (N,)."""
    columns = torch.cat([x, torch.ones_like(x[:, :1])], dim=1) if with_bias else x
    solution = torch.linalg.lstsq(columns, y[:, None]).solution[:, 0]
    return solution[:2], solution[2] if with_bias else torch.zeros_like(solution[0])


def oracle_mse(values: Tensor, y: Tensor) -> float:
    """Mean over points of the smallest squared error of any member, (K, N) and (N,)."""
    return float((values - y).square().amin(dim=0).mean())


def xor_oracle_mse(variance: float) -> float:
    """Oracle error of the experts a x_1 and -a x_1, each on its half-plane of x_2, at the best a = 1 / (1 + v)."""
    return variance / (1 + variance)


def xor_bayes_accuracy(variance: float) -> float:
    """Accuracy of the sign of x_1 x_2: 1 - 2 q (1 - q), q the normal tail beyond 1 / sqrt(variance)."""
    tail = 0.5 * math.erfc(1 / math.sqrt(2 * variance))
    return 1 - 2 * tail * (1 - tail)


#: Class probabilities of two models (rows) on the points 0.3 (class 0) and 0.7 (class 1) of iGAT's example, (2, 2, 2).
IGAT_TOY = torch.tensor([[[0.90, 0.10], [0.64, 0.36]], [[0.37, 0.63], [0.11, 0.89]]])


def igat_toy_risks() -> dict[str, float]:
    """0-1 risks of iGAT's two-point example: one model alone errs on a point, either combiner on none.

    Returns:
        ``"single"`` (the first model), and ``"max"`` and ``"avg"`` by the rules of ``ensdef.combine.COMBINERS``.
    """
    logits, y = IGAT_TOY.log(), torch.tensor([0, 1])
    scores = {"single": logits[0], **{rule: combine.COMBINERS[rule](logits) for rule in ("max", "avg")}}
    return {name: float((score.argmax(dim=1) != y).double().mean()) for name, score in scores.items()}


def igat_risk_single(p: float) -> float:
    """Risk of a single model on iGAT's ambiguous pairs: 1 - p + p^2 / 2, p the probability of its assumption."""
    return 1 - p + p**2 / 2


def igat_risk_pair(p: float) -> float:
    """Bound on the risk of two models: 1 - 3 p^2 + 3 p^3 - 3 p^4 / 4; the lower one from p = 1 - 1/sqrt(3) on.

    The paper states p >= 42.5 %.
    """
    return 1 - 3 * p**2 + 3 * p**3 - 0.75 * p**4
