"""The worked examples of the documentation are defences in their own right: checked, trained, attacked from outside."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

import ensdef
import ensdef.cli.inspect
import ensdef.cli.plugins
import ensdef.cli.run
from ensdef.cli import cli
from ensdef.registry import METHODS, load_plugin
from ensdef.testing import check_plugin, lend_adversary

EXAMPLE = Path(__file__).parent.parent / "examples" / "trades.py"


@pytest.fixture(autouse=True, scope="module")
def registered_while_these_tests_run() -> Iterator[None]:
    load_plugin(str(EXAMPLE))
    yield
    METHODS._registered.pop("trades", None)


def defense(beta: float = 6.0) -> ensdef.EnsembleDefense:
    return ensdef.create_defense(
        "trades", architecture="small_resnet[width=4]", members=2, num_classes=5, image_shape=(1, 8, 8), beta=beta
    )


def test_trades_passes_the_contract() -> None:
    assert [finding.message for finding in check_plugin("trades") if not finding.ok] == []


def test_trades_is_cross_entropy_plus_weighted_divergence_of_every_member() -> None:
    built = defense().eval()
    lend_adversary(built, eps=0.2)
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6) % 5
    batch = ensdef.Batch(x, y, torch.arange(6))
    crafted: list[torch.Tensor] = []
    original = built.adversary

    def remembering(*args: object, **options: object) -> torch.Tensor:
        crafted.append(original(*args, **options))  # type: ignore[arg-type]
        return crafted[-1]

    built.adversary = remembering  # type: ignore[method-assign, assignment]
    terms = built.loss(batch, 0.0)
    assert isinstance(terms, dict)
    ce, divergence = torch.zeros(()), torch.zeros(())
    for member, x_adv in zip(built.members, crafted, strict=True):
        clean, adversarial = member(x).softmax(1), member(x_adv).softmax(1)
        ce = ce + F.cross_entropy(member(x), y)
        divergence = divergence + (clean * (clean / adversarial).log()).sum(1).mean()
    torch.testing.assert_close(terms["ce"], ce)
    torch.testing.assert_close(terms["divergence"], 6 * divergence, atol=1e-5, rtol=1e-4)
    assert float(divergence.detach()) > 0, "the attack raises what the second term lowers"


def test_trades_without_its_second_term_is_plain_training() -> None:
    built = defense(beta=0.0)
    lend_adversary(built, eps=0.2)
    terms = built.loss(ensdef.Batch(torch.rand(4, 1, 8, 8), torch.arange(4), torch.arange(4)), 0.0)
    assert isinstance(terms, dict)
    assert float(terms["divergence"].detach()) == 0


def test_trades_runs_beside_a_built_in_defence(tmp_path: Path) -> None:
    small = ["--samples", "20", "--limit", "100", "--epochs", "1", "--members", "2", "--device", "cpu"]
    outcome = CliRunner().invoke(
        cli, ["bench", "--plugin", str(EXAMPLE), "--method", "trades,nat", "--json", "--results", str(tmp_path), *small]
    )
    assert outcome.exit_code == 0, outcome.output
    assert {record["method"] for record in json.loads(outcome.stdout)} == {"trades", "nat"}
