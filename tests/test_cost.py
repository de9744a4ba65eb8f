"""What a training batch costs: passes by kind, and the counts that papers and released codes imply."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ensdef.build import create_defense
from ensdef.cli import cli, inspect  # noqa: F401 - adds its commands
from ensdef.cost import Passes, count_passes
from ensdef.defense import Batch, EnsembleDefense, Terms, register_defense
from ensdef.errors import UsageError
from ensdef.gradients import input_gradients
from ensdef.losses import cross_entropy, member_cross_entropy
from ensdef.recipe import InnerAttack, Recipe
from ensdef.registry import METHODS

Loss = Callable[[Any, Batch], Any]


def counted(loss: Loss, **attributes: Any) -> Passes:
    """The passes of a defence of two members with this loss, 3 steps, 8 images; it leaves no trace in the registry."""
    body = {"loss": lambda self, batch, progress: loss(self, batch), **attributes}
    register_defense("toy_cost")(type("Toy", (EnsembleDefense,), body))
    try:
        return count_passes("toy_cost", members=2, steps=3, batch=8)
    finally:
        del METHODS._registered["toy_cost"]


def ce(defense: EnsembleDefense, x: Tensor, y: Tensor) -> Tensor:
    return member_cross_entropy(defense.member_logits(x), y).mean()


def losses_of(defense: Any, x: Tensor, y: Tensor) -> list[Tensor]:
    return [cross_entropy(member(x), y) for member in defense.members]


# -- kinds ------------------------------------------------------------------------------------------------------


def test_a_pass_whose_loss_reaches_the_parameters_is_training() -> None:
    assert counted(lambda self, batch: {"ce": ce(self, batch.x, batch.y)}) == Passes(training=2)


def test_a_pass_without_gradient_is_forward_however_it_came_about() -> None:
    def loss(self: Any, batch: Batch) -> Terms:
        with torch.no_grad():
            self.members[0](batch.x)
        self.members[0](batch.x).detach()
        self.members[1](batch.x)  # a graph that nobody follows
        return {"ce": ce(self, batch.x, batch.y)}

    assert counted(loss) == Passes(forward=3, training=2)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_every_attack_step_is_an_input_gradient_of_every_member_attacked(mode: Any) -> None:
    """With batch norm in eval mode the passes are those of a folded copy, in train mode those of the members."""

    def loss(self: Any, batch: Batch) -> Terms:
        self.adversary(self.members[0], batch.x, batch.y)
        return {"adv_ce": ce(self, self.adversary(self, batch.x, batch.y), batch.y)}

    found = counted(loss, recipe=Recipe(attack=InnerAttack(batch_norm=mode)))
    assert found == Passes(input_gradient=3 + 2 * 3, training=2)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_an_objective_of_its_own_counts_like_a_module(mode: Any) -> None:
    def loss(self: Any, batch: Batch) -> Terms:
        net = self.as_attacked(self.members[1])
        with torch.no_grad():
            target = net.features(batch.x.flip(0), 2)
        x_adv = self.adversary(lambda z: (net.features(z, 2) - target).flatten(1).square().sum(1), batch.x, steps=4)
        return {"ce": ce(self, x_adv, batch.y)}

    found = counted(loss, recipe=Recipe(attack=InnerAttack(batch_norm=mode)))
    assert found == Passes(forward=1, input_gradient=4, training=2)


def test_an_attack_through_the_live_ensemble_is_no_training_although_its_parameters_ask_for_gradients() -> None:
    def loss(self: Any, batch: Batch) -> Terms:
        x = batch.x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(self.predict(x), batch.y).sum(), x)
        return {"adv_ce": ce(self, batch.x + 0.1 * gradient.sign(), batch.y)}

    assert counted(loss) == Passes(input_gradient=2, training=2)


def test_an_attack_that_fills_the_parameters_gradients_too_is_as_dear_as_training() -> None:
    def loss(self: Any, batch: Batch) -> Terms:
        x = batch.x.clone().requires_grad_()
        cross_entropy(self.predict(x), batch.y).sum().backward()
        return {"adv_ce": ce(self, batch.x + 0.1 * x.grad.sign(), batch.y)}  # type: ignore[union-attr]

    assert counted(loss) == Passes(training=4)


def test_training_on_images_that_ask_for_a_gradient_is_training_and_no_attack() -> None:
    def loss(self: Any, batch: Batch) -> Terms:
        return {"ce": ce(self, batch.x.clone().requires_grad_(), batch.y)}

    assert counted(loss) == Passes(training=2)


def test_a_penalised_input_gradient_is_a_double_backward() -> None:
    def loss(self: Any, batch: Batch) -> Terms:
        x = batch.x.clone().requires_grad_()
        return {"penalty": input_gradients(losses_of(self, x, batch.y), x).square().mean()}

    assert counted(loss) == Passes(double_backward=2)


def test_a_double_backward_shares_its_pass_with_the_first_order_loss() -> None:
    def loss(self: Any, batch: Batch) -> Terms:
        x = batch.x.clone().requires_grad_()
        losses = losses_of(self, x, batch.y)
        return {"ce": torch.stack(losses).mean(), "penalty": input_gradients(losses, x).square().mean()}

    assert counted(loss) == Passes(double_backward=2)


def test_an_input_gradient_with_a_graph_that_is_not_used_is_no_double_backward() -> None:
    """A counter that looks at create_graph alone would take it for one."""

    def loss(self: Any, batch: Batch) -> Terms:
        x = batch.x.clone().requires_grad_()
        gradients = input_gradients(losses_of(self, x, batch.y), x)
        x_adv = batch.x + 0.1 * gradients.detach().mean(dim=0).view_as(batch.x).sign()
        return {"adv_ce": ce(self, x_adv, batch.y)}

    assert counted(loss) == Passes(input_gradient=2, training=2)


def test_the_gradient_of_one_member_is_not_charged_to_another_on_the_same_image() -> None:
    def loss(self: Any, batch: Batch) -> Terms:
        x = batch.x.clone().requires_grad_()
        first, second = (cross_entropy(member(x), batch.y) for member in self.members)
        return {"ce": (first + second).mean(), "penalty": input_gradients([first], x).square().mean()}

    assert counted(loss) == Passes(training=1, double_backward=1)


def test_every_backward_through_one_forward_counts() -> None:
    """All members' losses in one tensor: the gradient of each runs back, with zeros, through the others too."""

    def loss(self: Any, batch: Batch) -> Terms:
        x = batch.x.clone().requires_grad_()
        losses = member_cross_entropy(self.member_logits(x), batch.y)
        return {"penalty": input_gradients(list(losses), x).square().mean()}

    assert counted(loss) == Passes(double_backward=2 * 2)


def test_a_gradient_for_every_class_is_a_pass_for_every_class() -> None:
    def loss(self: Any, batch: Batch) -> Terms:
        x = batch.x.clone().requires_grad_()
        logits = self.members[0](x)
        for index in range(10):
            torch.autograd.grad(logits[:, index].sum(), x, retain_graph=True)
        return {"ce": cross_entropy(logits, batch.y).mean() + ce(self, batch.x, batch.y)}

    assert counted(loss) == Passes(input_gradient=10, training=1 + 2)


def test_a_search_for_large_input_gradients_is_a_double_backward_a_step() -> None:
    def loss(self: Any, batch: Batch) -> Terms:
        def size(z: Tensor) -> Tensor:
            return input_gradients(losses_of(self.as_attacked(self), z, batch.y), z).square().sum(dim=(0, 2))

        return {"ce": ce(self, self.adversary(size, batch.x), batch.y)}

    assert counted(loss) == Passes(training=2, double_backward=2 * 3)


# -- what a pass is ---------------------------------------------------------------------------------------------


def test_a_pass_over_part_of_the_batch_counts_that_part() -> None:
    def loss(self: Any, batch: Batch) -> Terms:
        x_adv = self.adversary(self.members[0], batch.x[:4], batch.y[:4])
        return {"ce": ce(self, torch.cat([batch.x[4:], x_adv]), batch.y), "more": ce(self, batch.x[:2], batch.y[:2])}

    assert counted(loss) == Passes(input_gradient=3 * 0.5, training=2 + 2 * 0.25)


def test_images_of_a_second_stream_count_like_those_of_the_first() -> None:
    def loss(self: Any, batch: Batch) -> Terms:
        ((other, labels),) = batch.streams
        return {"ce": ce(self, torch.cat([batch.x, other]), torch.cat([batch.y, labels]))}

    assert counted(loss, streams=2) == Passes(training=4)


def test_several_optimiser_steps_are_counted_together() -> None:
    def loss(self: Any, batch: Batch) -> Iterator[Terms]:
        for member in self.members:
            x_adv = self.adversary(member, batch.x, batch.y)
            yield {"adv_ce": cross_entropy(member(x_adv), batch.y).mean()}

    assert counted(loss) == Passes(input_gradient=2 * 3, training=2)


def test_networks_inside_other_modules_and_gates_count_and_other_modules_do_not() -> None:
    class Headed(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network, self.head = network, nn.Linear(10, 10)

        def forward(self, x: Tensor) -> Any:
            return self.head(self.network(x=x))

    def build(cls: Any, make_network: Any, members: int, num_classes: int, hyper: Any) -> Any:
        defense = cls([Headed(make_network()) for _ in range(members)], hyper)
        defense.gate = make_network(outputs=members)
        return defense

    def loss(self: Any, batch: Batch) -> Terms:
        return {"ce": ce(self, batch.x, batch.y), "gate": self.gate(batch.x).square().mean()}

    assert counted(loss, build=classmethod(build)) == Passes(training=3)


def test_a_frozen_member_is_only_run() -> None:
    def trainable(self: Any) -> Iterable[nn.Parameter]:
        return self.members[0].parameters()

    assert counted(lambda self, batch: {"ce": ce(self, batch.x, batch.y)}, trainable=trainable) == Passes(
        forward=1, training=1
    )


def test_the_total_weighs_the_kinds_by_the_multiplications_they_make() -> None:
    class Multiplications(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            if function._overloadpacket in flop_registry:
                self.made += flop_registry[function._overloadpacket](*args, **(kwargs or {}), out_val=out)
            return out

    defense = create_defense("nat", architecture="small_resnet[width=16]", members=1).train()
    x, y = torch.rand(2, 3, 32, 32), torch.arange(2)

    def made(kind: str) -> int:
        z = x.clone().requires_grad_(kind in ("input_gradient", "double_backward"))
        with Multiplications() as counter, torch.set_grad_enabled(kind != "forward"):
            losses = losses_of(defense, z, y)
            if kind == "training":
                losses[0].sum().backward()
            elif kind == "input_gradient":
                torch.autograd.grad(losses[0].sum(), z)
            elif kind == "double_backward":
                input_gradients(losses, z).square().sum().backward()
        return counter.made

    for kind in Passes.__dataclass_fields__:
        assert made(kind) / made("training") == pytest.approx(Passes(**{kind: 1}).total, rel=0.05), kind


# -- the methods ------------------------------------------------------------------------------------------------

SIZES = [(2, 3), (4, 2)]


@pytest.mark.parametrize(("n", "k"), SIZES)
class TestPublishedCounts:
    """N members, K attack steps; FB is a forward and a backward of one member."""

    def test_nat_trains_every_member_once(self, n: int, k: int) -> None:
        assert count_passes("nat", n, k) == Passes(training=n)

    def test_adv_is_one_member_attacked_and_trained(self, n: int, k: int) -> None:
        assert count_passes("adv", n, k) == Passes(input_gradient=k, training=1)

    def test_adv_en_with_its_clean_term_makes_kn_and_2n(self, n: int, k: int) -> None:
        assert count_passes("adv_en[clean_term=true]", n, k) == Passes(input_gradient=k * n, training=2 * n)

    def test_adv_en_without_the_clean_term_of_cce_saves_n(self, n: int, k: int) -> None:
        assert count_passes("adv_en", n, k) == Passes(input_gradient=k * n, training=n)

    @pytest.mark.parametrize("adversarial", ["full", "ce"])
    def test_adversarial_adp_costs_what_adv_en_costs_with_a_clean_term(self, n: int, k: int, adversarial: str) -> None:
        assert count_passes(f"adp[adversarial={adversarial}]", n, k) == Passes(input_gradient=k * n, training=2 * n)

    def test_adp_on_clean_images_costs_what_nat_costs(self, n: int, k: int) -> None:
        assert count_passes("adp[adversarial=none]", n, k) == Passes(training=n)

    def test_soe_phase_1_makes_km_and_m_squared(self, n: int, k: int) -> None:
        assert count_passes("soe[phases=submodel]", n, k) == Passes(input_gradient=k * n, training=n * n)

    def test_soe_phase_2_attacks_only_the_member_chosen_on_the_clean_image_after_m_forwards(
        self, n: int, k: int
    ) -> None:
        """The released code scores all M members at every step: K M forwards; the paper's Algorithm 1 does not."""
        assert count_passes("soe[phases=collaboration]", n, k) == Passes(forward=n, input_gradient=k, training=n)

    def test_soe_phase_2_that_reselects_differentiates_the_members_not_chosen_too(self, n: int, k: int) -> None:
        """The gradient of a choice is zero for the others, but computed: K M backwards where K would do."""
        found = count_passes("soe[phases=collaboration,reselect=true]", n, k)
        assert found == Passes(input_gradient=k * n, training=n)

    def test_soe_does_both_phases_in_every_batch(self, n: int, k: int) -> None:
        assert count_passes("soe", n, k) == Passes(forward=n, input_gradient=k * n + k, training=n * n + n)

    def test_cce_makes_kn_and_n_and_n_squared(self, n: int, k: int) -> None:
        """The released code crafts K N more for a number that it logs."""
        assert count_passes("cce", n, k) == Passes(input_gradient=k * n, training=n + n * n)

    def test_cce_without_crossing_terms_is_n_times_adv_with_a_clean_term(self, n: int, k: int) -> None:
        assert count_passes("cce[mode=base]", n, k) == Passes(input_gradient=k * n, training=2 * n)

    @pytest.mark.parametrize("name", ["gal", "trs", "cldl"])
    def test_gradient_penalties_make_n_double_backwards_that_serve_the_first_order_loss_too(
        self, name: str, n: int, k: int
    ) -> None:
        """Released codes make N passes more, for the loss (gal) or the features (cldl)."""
        assert count_passes(name, n, k) == Passes(double_backward=n)

    @pytest.mark.parametrize("name", ["gal", "cldl"])
    def test_adversarial_gradient_penalties_make_kn_and_n_more(self, name: str, n: int, k: int) -> None:
        found = count_passes(f"{name}[adversarial=true]", n, k)
        assert found == Passes(input_gradient=k * n, training=n, double_backward=n)

    def test_adversarial_trs_searches_with_half_the_batch_and_measures_smoothness_where_it_arrived(
        self, n: int, k: int
    ) -> None:
        found = count_passes("trs[adversarial=true,steps=6]", n, k)
        assert found == Passes(double_backward=n + 6 * n * 0.5 + n)

    def test_dverge_sees_each_target_once_a_crafting_in_eval_mode_and_not_once_a_step(self, n: int, k: int) -> None:
        found = count_passes("dverge[distill_steps=4]", n, k)
        assert found == Passes(forward=n, input_gradient=4 * n, training=n * (n - 1))

    def test_dverge_with_batch_statistics_makes_the_ns_forwards_of_the_released_code(
        self, n: int, k: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(METHODS.get("dverge"), "recipe", Recipe(attack=InnerAttack(batch_norm="train")))
        found = count_passes("dverge[distill_steps=4]", n, k)
        assert found == Passes(forward=4 * n, input_gradient=4 * n, training=n * (n - 1))

    def test_adversarial_dverge_makes_kn_and_n_more(self, n: int, k: int) -> None:
        found = count_passes("dverge[distill_steps=4,adversarial=true]", n, k)
        assert found == Passes(forward=n, input_gradient=4 * n + k * n, training=n * (n - 1) + n)

    def test_igat_adds_2n_to_adp_on_the_whole_batch_and_shares_its_examples(self, n: int, k: int) -> None:
        """Eq. (16), as the second of the released scripts: base loss and added terms see all images."""
        assert count_passes("igat[base=adp]", n, k) == Passes(input_gradient=k * n, training=2 * n + 2 * n)

    def test_igat_on_halves_costs_what_adp_costs(self, n: int, k: int) -> None:
        found = count_passes("igat[base=adp,halves=true]", n, k)
        assert found == Passes(input_gradient=k * n, training=2 * n)

    def test_max_attacks_once_a_ball_compares_and_trains_once(self, n: int, k: int) -> None:
        assert count_passes("max", n, k) == Passes(forward=2, input_gradient=2 * k, training=1)

    @pytest.mark.parametrize("sequential", ["true", "false"])
    def test_avg_attacks_and_trains_once_a_ball_in_one_optimiser_step_or_several(
        self, n: int, k: int, sequential: str
    ) -> None:
        found = count_passes(f"avg[sequential={sequential}]", n, k)
        assert found == Passes(input_gradient=2 * k, training=2)

    def test_msd_compares_the_balls_at_every_step(self, n: int, k: int) -> None:
        """One forward more than K a ball: the clean image is a candidate as well."""
        assert count_passes("msd", n, k) == Passes(forward=2 * k + 1, input_gradient=k, training=1)

    def test_more_attacks_gate_and_experts_for_every_ball_and_trains_on_every_setting(self, n: int, k: int) -> None:
        experts = 3  # clean and two balls
        found = count_passes("more[linf=eps,l2=0.5]", n, k)
        assert found == Passes(input_gradient=2 * k * (experts + 1), training=(2 + 2) * (experts + 1))


# -- the command ------------------------------------------------------------------------------------------------


def test_the_batch_size_does_not_change_the_count() -> None:
    assert count_passes("soe", batch=6) == count_passes("soe", batch=16)


def test_what_the_method_refuses_is_refused() -> None:
    with pytest.raises(UsageError, match="at most 9 members"):
        count_passes("adp", members=10)


def test_counting_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    count_passes("adp")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_is_counted_within_a_second(name: str) -> None:
    def seconds() -> float:
        began = time.process_time()
        passes = count_passes(name)
        assert passes.training + passes.double_backward > 0
        return time.process_time() - began

    assert seconds() < 1 or seconds() < 1  # the first call of a process also loads kernels


def test_the_list_shows_methods_and_plugins_and_one_that_cannot_be_counted_stops_no_other(tmp_path: Any) -> None:
    plugin = tmp_path / "toys.py"
    plugin.write_text(
        "from ensdef.defense import EnsembleDefense, register_defense\n"
        "@register_defense('dear_toy')\nclass Dear(EnsembleDefense):\n    fixed_members = 2\n"
        "    def loss(self, batch, progress):\n"
        "        return {'a': self.member_logits(batch.x).mean() + self.members[0](batch.x[:4]).mean()}\n"
        "@register_defense('a_refusing_toy')\nclass Refusing(EnsembleDefense):\n"
        "    def loss(self, batch, progress):\n        raise ValueError('not today')\n"
    )
    try:
        result = CliRunner().invoke(cli, ["list", "methods", "--cost", "--plugin", str(plugin)])
    finally:
        for name in ("dear_toy", "a_refusing_toy"):
            METHODS._registered.pop(name, None)
    assert result.exit_code == 0
    assert result.stderr == "a_refusing_toy cannot be counted: ValueError: not today\n"
    rows = {words[0]: words[1:] for words in map(str.split, result.stdout.splitlines()) if words}
    assert rows["dear_toy"] == ["2", "0", "0", "2.5", "0", "2.5"]
    assert rows["adv_en"] == ["3", "0", "30", "3", "0", "23"]
    assert rows["adv"] == ["1", "0", "10", "1", "0", "7.7"]
    assert {*METHODS.names()} <= {*rows}


def test_only_methods_have_a_cost() -> None:
    result = CliRunner().invoke(cli, ["list", "attacks", "--cost"])
    assert result.exit_code == 2
    assert "--cost is for methods" in result.stderr
