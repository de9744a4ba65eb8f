"""How images crafted on one member carry over to another: CCE's summary, DVERGE's two matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys_defense import CLASSES, SHAPE, generator, spread
from toys_diagnostics import Written, images_of

from ensdef.build import create_defense
from ensdef.defense import EnsembleDefense
from ensdef.diagnostics import (
    Transferability,
    craft_on_each,
    distill,
    diversity_matrix,
    right_for_all_members,
    transfer_matrix,
    transferability,
)
from ensdef.errors import UsageError
from ensdef.losses import member_cross_entropy

quick = settings(deadline=None, max_examples=25, derandomize=True)

#: Bui et al. 2021, Table 6, percent: a(en,en), a(1,1), a(2,2), S11, S01, S10, S00, T, nT, a_single.
PUBLISHED = {
    "adv_en": (40.7, 31.1, 33.2, 24.0, 17.0, 13.0, 46.0, 65.5, 13.3, 16.7),
    "adp": (42.9, 31.0, 33.1, 25.7, 13.1, 11.7, 49.5, 59.3, 7.6, 17.2),
    "cce_rm": (45.5, 41.7, 41.4, 39.9, 5.2, 5.5, 49.5, 33.7, 5.0, 5.6),
    "cce_base": (43.3, 40.3, 40.5, 36.1, 6.5, 7.2, 50.3, 36.1, 6.4, 7.2),
}
#: a(1,2) + a(2,1), which the table does not print.
CROSS = {"adv_en": 129.8, "adp": 123.4, "cce_rm": 116.8, "cce_base": 116.9}


# --- the published rows ---------------------------------------------------------------------------


def published(name: str) -> Transferability:
    """A row of the table as the function would have found it."""
    ensemble, first, second, s11, s01, s10, s00, *_ = PUBLISHED[name]
    cross = 0.7 * CROSS[name], 0.3 * CROSS[name]
    accuracy = [[first, cross[0], 0.0], [cross[1], second, 0.0], [s11 + s10, s11 + s01, ensemble]]
    both, only, neither = [[0.0, s11], [s11, 0.0]], [[0.0, s10], [s01, 0.0]], [[0.0, s00], [s00, 0.0]]
    return Transferability(*(torch.tensor(part).double() / 100 for part in (accuracy, both, only, neither)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_summaries_follow_from_the_published_accuracies_and_subsets(name: str) -> None:
    row = published(name)
    found = [100 * value for value in (row.T, row.nT, row.a_single)]
    assert found == pytest.approx(PUBLISHED[name][-3:], abs=0.01)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_subsets_are_a_partition_up_to_rounding(name: str) -> None:
    _, _, _, s11, s01, s10, s00, *_ = PUBLISHED[name]
    assert s11 + s01 + s10 + s00 == pytest.approx(100, abs=0.11)


# --- CCE on answers known in advance --------------------------------------------------------------


def drawn_answers(members: int, seed: int, count: int = 12) -> tuple[EnsembleDefense, Tensor, dict[int | str, Tensor]]:
    """Crafted images with answers of random sureness."""
    rng = generator(seed)
    crafted: dict[int | str, Tensor] = {
        key: 3 * torch.randn(count, members, 3, generator=rng) for key in [*range(members), "en"]
    }
    return Written(members, 3), torch.randint(3, (count,), generator=rng), crafted


def plain_hits(crafted: dict[int | str, Tensor], y: Tensor, members: int) -> dict[Any, list[bool]]:
    """Whether ``model`` is right on each image crafted on ``source``, by (source, model)."""
    hits: dict[Any, list[bool]] = {}
    for source, images in crafted.items():
        for member in range(members):
            hits[source, member] = [
                int(image[member].argmax()) == int(label) for image, label in zip(images, y, strict=True)
            ]
        hits[source, "en"] = [
            int(image.softmax(dim=1).mean(dim=0).argmax()) == int(label) for image, label in zip(images, y, strict=True)
        ]
    return hits


@quick
@given(st.integers(2, 4), st.integers(0, 10**6))
def test_accuracies_and_subsets_are_counted_as_in_a_plain_rewrite(members: int, seed: int) -> None:
    defense, y, crafted = drawn_answers(members, seed)
    hits, found = plain_hits(crafted, y, members), transferability(defense, y, crafted)
    keys = [*range(members), "en"]
    for i, source in enumerate(keys):
        for j, model in enumerate(keys):
            assert float(found.accuracy[i, j]) == pytest.approx(sum(hits[source, model]) / len(y))
    for i in range(members):
        for j in range(members):
            pairs = list(zip(hits["en", i], hits["en", j], strict=True))
            for subset, wanted in ((found.both, (True, True)), (found.only, (True, False))):
                assert float(subset[i, j]) == pytest.approx(pairs.count(wanted) / len(y))
            assert float(found.neither[i, j]) == pytest.approx(pairs.count((False, False)) / len(y))


@quick
@given(st.integers(2, 4), st.integers(0, 10**6))
def test_summaries_are_means_over_the_ordered_pairs_of_members(members: int, seed: int) -> None:
    defense, y, crafted = drawn_answers(members, seed)
    found = transferability(defense, y, crafted)
    a, ensemble = found.accuracy, float(found.accuracy[-1, -1])
    pairs = [(i, j) for i in range(members) for j in range(members) if i != j]

    def mean(values: list[Any]) -> float:
        return sum(map(float, values)) / len(pairs)

    t = {(i, j): float(a[i, j] - a[i, i] + a[j, i] - a[j, j]) for i, j in pairs}
    assert {(i, j): float(found.pairs[i, j]) for i, j in pairs} == pytest.approx(t)
    assert [found.T, found.nT, found.a_single] == pytest.approx(
        [
            mean(list(t.values())),
            1 - ensemble - mean([found.neither[i, j] for i, j in pairs]),
            ensemble - mean([found.both[i, j] for i, j in pairs]),
        ]
    )


@quick
@given(st.integers(0, 10**6))
def test_the_identities_of_two_averaged_members_hold(seed: int) -> None:
    defense, y, crafted = drawn_answers(2, seed)
    found = transferability(defense, y, crafted)
    s11, s10, s01, s00 = map(float, (found.both[0, 1], found.only[0, 1], found.only[1, 0], found.neither[0, 1]))
    assert s11 + s10 + s01 + s00 == pytest.approx(1)
    assert s11 <= float(found.accuracy[-1, -1]) + 1e-12
    assert float(found.accuracy[-1, 0]) == pytest.approx(s11 + s10)
    assert float(found.accuracy[-1, 1]) == pytest.approx(s11 + s01)
    assert found.a_single >= -1e-12
    cross = float(found.accuracy[0, 1] + found.accuracy[1, 0])
    assert cross == pytest.approx(found.T + float(found.accuracy[0, 0] + found.accuracy[1, 1]))


def test_two_different_wrong_answers_can_average_to_the_right_one() -> None:
    """So nT is no share of images: here the ensemble has no error, and both members err."""
    image = torch.tensor([[[0.0, 0.4, -9.0], [0.0, -9.0, 0.4]]])
    found = transferability(Written(2, 3), torch.tensor([0]), {0: image, 1: image, "en": image})
    assert float(found.accuracy[-1, -1]) == 1.0
    assert float(found.neither[0, 1]) == 1.0
    assert found.nT == -1.0


def test_members_that_fail_on_their_own_images_alone_transfer_nothing() -> None:
    y = torch.zeros(4, dtype=torch.int64)
    crafted: dict[int | str, Tensor] = {
        0: images_of([[1] * 4, [0] * 4], 3),
        1: images_of([[0] * 4, [1] * 4], 3),
        "en": images_of([[1, 1, 0, 0], [0, 0, 0, 1]], 3),
    }
    alike = {**crafted, 0: crafted["en"], 1: crafted["en"]}
    found = [transferability(Written(2, 3), y, images).T for images in (crafted, alike)]
    assert found == pytest.approx([2.0, 0.0])


def test_a_single_member_has_nobody_to_transfer_to() -> None:
    with pytest.raises(UsageError, match="the defence has 1; expected at least 2"):
        transferability(Written(1, 3), torch.tensor([0]), {0: torch.zeros(1, 1, 3), "en": torch.zeros(1, 1, 3)})


def test_images_of_every_member_and_the_ensemble_are_needed() -> None:
    image = torch.zeros(1, 2, 3)
    with pytest.raises(UsageError, match="no images crafted on 'en'; expected keys 0, 1, 'en'"):
        transferability(Written(2, 3), torch.tensor([0]), {0: image, 1: image})


# --- DVERGE's transferability ---------------------------------------------------------------------

#: Clean answers of two members on four images of class 0; the last one counts for neither matrix.
CLEAN = images_of([[0, 0, 0, 0], [0, 0, 0, 1]], 3)
ZEROS = torch.zeros(4, dtype=torch.int64)


def test_only_images_that_all_members_get_right_count() -> None:
    assert right_for_all_members(Written(2, 3), CLEAN, ZEROS).tolist() == [True, True, True, False]


def test_the_transfer_matrix_is_a_success_rate_over_images_right_for_all() -> None:
    crafted: dict[int | str, Tensor] = {
        0: images_of([[1, 1, 1, 1], [1, 0, 0, 1]], 3),
        1: images_of([[0, 0, 0, 1], [1, 1, 2, 1]], 3),
    }
    matrix = transfer_matrix(Written(2, 3), CLEAN, ZEROS, [crafted])
    assert matrix[:, :2].flatten().tolist() == pytest.approx([1, 1 / 3, 0, 1])


def test_any_random_start_that_fools_counts() -> None:
    starts: list[dict[int | str, Tensor]] = [
        {0: images_of([[1, 0, 0, 0], [0, 0, 0, 0]], 3), 1: images_of([[0] * 4, [0] * 4], 3)},
        {0: images_of([[0, 1, 0, 1], [0, 0, 0, 1]], 3), 1: images_of([[0] * 4, [0] * 4], 3)},
    ]
    first, second = (transfer_matrix(Written(2, 3), CLEAN, ZEROS, [start])[0, 0] for start in starts)
    assert [float(first), float(second)] == pytest.approx([1 / 3, 1 / 3])
    assert float(transfer_matrix(Written(2, 3), CLEAN, ZEROS, starts)[0, 0]) == pytest.approx(2 / 3)


def test_the_last_column_is_the_deployed_ensemble() -> None:
    crafted: dict[int | str, Tensor] = {0: CLEAN.clone(), 1: CLEAN.clone()}
    crafted[0][0] = torch.tensor([[0.0, 9.0, 0.0], [0.1, 0.0, 0.0]])  # member 0 outvotes member 1
    matrix = transfer_matrix(Written(2, 3), CLEAN, ZEROS, [crafted])
    assert matrix.flatten().tolist() == pytest.approx([1 / 3, 0, 1 / 3, 0, 0, 0])


def test_there_must_be_images_that_are_right_for_all_and_at_least_one_start() -> None:
    with pytest.raises(UsageError, match="none of the 4 images"):
        transfer_matrix(Written(2, 3), CLEAN, ZEROS + 2, [{0: CLEAN, 1: CLEAN}])
    with pytest.raises(UsageError, match="starts is empty"):
        transfer_matrix(Written(2, 3), CLEAN, ZEROS, [])
    with pytest.raises(UsageError, match="no images crafted on 1"):
        transfer_matrix(Written(2, 3), CLEAN, ZEROS, [{0: CLEAN}])


# --- DVERGE's diversity ---------------------------------------------------------------------------


def networks(count: int = 60) -> tuple[EnsembleDefense, Tensor, Tensor]:
    """Two networks that see all classes, and images with the labels that the first one gives."""
    defense = create_defense(
        "nat", architecture="small_resnet[width=4]", members=2, num_classes=CLASSES, image_shape=SHAPE
    )
    spread(defense)
    x = torch.rand(count, *SHAPE, generator=generator())
    with torch.no_grad():
        for member in defense.members:
            member.classifier.bias -= member(x).mean(dim=0)
        return defense, x, defense.members[0](x).argmax(dim=1)


def test_a_distillation_that_copies_the_target_costs_what_the_target_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    defense, x, y = networks()
    chosen = right_for_all_members(defense, x, y)
    assert 2 < int(chosen.sum()) < len(x)
    with torch.no_grad():
        clean = member_cross_entropy(defense.member_logits(x[chosen]), y[chosen]).double().mean(dim=1)
    monkeypatch.setattr("ensdef.diagnostics.transfer.distill", lambda member, x, target, layer, **_: target)
    torch.testing.assert_close(diversity_matrix(defense, x, y), clean.expand(2, 2), rtol=1e-4, atol=1e-6)


def test_images_that_were_not_changed_cost_more_against_the_target_than_against_their_own_label(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    defense, x, y = networks()
    monkeypatch.setattr("ensdef.diagnostics.transfer.distill", lambda member, x, target, layer, **_: x)
    source = diversity_matrix(defense, x, y)
    monkeypatch.setattr("ensdef.diagnostics.transfer.distill", lambda member, x, target, layer, **_: target)
    assert bool((source > diversity_matrix(defense, x, y)).all())


def test_the_row_is_the_member_distilled_from_and_the_column_the_member_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    defense, x, y = networks()
    second = defense.members[1]

    def copying_the_second(member: Any, x: Tensor, target: Tensor, layer: int, **_: Any) -> Tensor:
        return target if member is second else x

    monkeypatch.setattr("ensdef.diagnostics.transfer.distill", lambda member, x, target, layer, **_: x)
    source = diversity_matrix(defense, x, y)
    monkeypatch.setattr("ensdef.diagnostics.transfer.distill", lambda member, x, target, layer, **_: target)
    copied = diversity_matrix(defense, x, y)
    monkeypatch.setattr("ensdef.diagnostics.transfer.distill", copying_the_second)
    torch.testing.assert_close(diversity_matrix(defense, x, y), torch.stack([source[0], copied[1]]))


def test_every_batch_draws_one_layer_for_all_members(monkeypatch: pytest.MonkeyPatch) -> None:
    defense, x, y = networks(100)
    calls: list[tuple[int, int]] = []

    def recording(member: Any, x: Tensor, target: Tensor, layer: int, **settings: Any) -> Tensor:
        calls.append((layer, len(x)))
        assert settings == {"eps": "0.07", "steps": 10}
        assert not torch.equal(x, target)
        return x

    monkeypatch.setattr("ensdef.diagnostics.transfer.distill", recording)
    diversity_matrix(defense, x, y, batch_size=3)
    layers = [layer for layer, _ in calls]
    assert layers[::2] == layers[1::2]
    assert set(layers) == set(range(1, defense.members[0].num_layers + 1))
    assert sum(size for _, size in calls) == 2 * int(right_for_all_members(defense, x, y).sum())
    assert max(size for _, size in calls) == 3


def test_the_seed_decides_orders_and_layers() -> None:
    defense, x, y = networks()
    first, again, other = (diversity_matrix(defense, x, y, steps=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_member_is_drawn_towards_the_target_by_what_was_distilled_from_it() -> None:
    defense, x, y = networks()
    far, near = (diversity_matrix(defense, x, y, eps=eps) for eps in (0.0, 0.5))
    assert bool((near.diagonal() < far.diagonal()).all())


def test_real_images_fill_both_dverge_matrices() -> None:
    defense, x, y = networks()
    starts = [craft_on_each(defense, x, y, eps=0.2, steps=5, seed=seed) for seed in (0, 1)]
    matrix = transfer_matrix(defense, x, y, starts)
    assert matrix.shape == (2, 3)
    assert bool((matrix.diagonal()[:2] > 0).all())
    assert bool((matrix >= transfer_matrix(defense, x, y, starts[:1])).all())
    assert distill(defense.members[0], x[:2], x[2:4], 1).shape == x[:2].shape
