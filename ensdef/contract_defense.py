"""The contract of a defence, clause by clause, on tiny networks: what ``ensdef check NAME`` runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ensdef.build import build_defense
from ensdef.checkpoints import fit
from ensdef.data import Data, Split
from ensdef.defense import Batch, EnsembleDefense
from ensdef.folding import frozen_copy
from ensdef.journal import Journal
from ensdef.losses import cross_entropy
from ensdef.registry import METHODS
from ensdef.scores import check_scores
from ensdef.specs import DataSpec, ModelSpec, Setting, TrainSpec
from ensdef.testing import expect, is_frozen, lend_adversary, stopped_and_resumed
from ensdef.training import Trained, train

CLASSES, SHAPE = 5, (1, 8, 8)


def _images(count: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *SHAPE, generator=generator), torch.arange(count) % CLASSES


def _built(name: str) -> EnsembleDefense:
    expect(
        is_frozen(METHODS.get(name).Hyper),
        f"{name}.Hyper must be a frozen dataclass, to be part of a key; decorate it with @dataclass(frozen=True)",
    )
    spec = ModelSpec.create(name, {}, "small_resnet[width=4]", 3, CLASSES, SHAPE, (0.5,), (0.25,))
    defense = build_defense(spec, seed=1)
    # untrained networks give every image nearly the same scores; spread them, so that comparisons mean something
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in defense.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return defense


def check_builds(name: str) -> None:
    defense = _built(name)
    count = len(list(defense.members))
    expect(count > 0, f"{name} has no members; call super().__init__(members, hyper) or expose `members` as a property")


def check_tells_its_source(name: str) -> None:
    cls = METHODS.get(name)
    module = sys.modules[cls.__module__]
    expect(bool((cls.__doc__ or "").strip()), f"the class of {name} has no docstring; say in one line what it does")
    expect(
        bool((module.__doc__ or "").strip()), f"the file of {name} has no docstring; name title, authors, venue, year"
    )


def check_predict_returns_log_scores(name: str) -> None:
    defense = _built(name)
    x, _ = _images()
    check_scores(defense.predict(x), len(x), f"{name}.predict")
    scores = defense.predict(x)
    expect(scores.shape[1] == CLASSES, f"{name}.predict returned {scores.shape[1]} classes; expected {CLASSES}")


def check_predict_is_deterministic(name: str) -> None:
    defense = _built(name)
    x, _ = _images()
    with torch.no_grad():
        expect(
            torch.equal(defense.predict(x), defense.predict(x)),
            f"{name}.predict differs between two calls in eval mode; remove randomness, or make it depend on x alone",
        )


def check_predict_treats_images_alone(name: str) -> None:
    defense = _built(name)
    x, _ = _images()
    with torch.no_grad():
        together = defense.predict(x)
        alone = torch.cat([defense.predict(image[None]) for image in x])
    expect(
        torch.allclose(together, alone, atol=1e-4),
        f"{name}.predict of an image depends on its batch; use no statistics over the batch at inference",
    )


def check_eval_reaches_every_member(name: str) -> None:
    defense = _built(name).train().eval()
    training = [index for index, member in enumerate(defense.members) if any(m.training for m in member.modules())]
    expect(not training, f"{name}.eval() leaves member {training[:1]} in train mode; keep members in an nn.ModuleList")


def check_gradient_reaches_the_image(name: str) -> None:
    defense = _built(name)
    x, y = _images()
    x.requires_grad_()
    scores = defense.predict(x)
    expect(scores.requires_grad, f"{name}.predict is detached from the image; do not use no_grad or detach there")
    (gradient,) = torch.autograd.grad(cross_entropy(scores, y).sum(), x, allow_unused=True)
    expect(gradient is not None, f"{name}.predict is detached from the image; do not use no_grad or detach there")
    dead = int((gradient.flatten(1).abs().amax(dim=1) == 0).sum())
    expect(
        dead == 0,
        f"{name}.predict has no input gradient on {dead} of {len(x)} images: attacks would see nothing; "
        "avoid hard decisions, or declare a smooth reading in views()",
    )


def check_loss_gives_named_scalars(name: str) -> None:
    for terms in _loss(_built(name)):
        expect(
            isinstance(terms, dict) and bool(terms),
            f"{name}.loss must return a dict of named scalars (or yield several), got {type(terms).__name__}",
        )
        for key, value in terms.items():
            expect(
                isinstance(value, Tensor) and value.dim() == 0,
                f"{name}.loss term {key!r} is {_describe(value)}; expected a scalar tensor: take its mean",
            )
            expect(bool(torch.isfinite(value)), f"{name}.loss term {key!r} is {value.item()} on random images")


def check_loss_reaches_every_member(name: str) -> None:
    defense = _built(name)
    defense.zero_grad(set_to_none=True)
    trainable = {id(parameter) for parameter in defense.trainable()}
    for terms in _loss(defense):
        total = torch.stack(list(terms.values())).sum()
        expect(total.requires_grad, f"{name}.loss has no gradient to any parameter; do not detach the training pass")
        total.backward()
    for index, member in enumerate(defense.members):
        moved = [p for p in member.parameters() if id(p) in trainable]
        expect(
            not moved or any(p.grad is not None and bool((p.grad != 0).any()) for p in moved),
            f"{name}.loss gives member {index} no gradient: it would never learn; include it in a term, or leave it "
            "out of trainable()",
        )


def check_labels_do_not_leak_into_predict(name: str) -> None:
    defense = _built(name)
    x, y = _images()
    state = {key: value.clone() for key, value in defense.state_dict().items()}
    seen = []
    for labels in (y, (y + 1) % CLASSES):
        _loss(defense, labels)
        defense.load_state_dict(state)
        with torch.no_grad():
            seen.append(defense.eval().predict(x))
    expect(torch.equal(*seen), f"{name}.predict depends on the labels that loss() saw last; keep no labels on self")


def check_weights_survive_saving(name: str) -> None:
    defense = _built(name)
    x, _ = _images()
    copy = build_defense(defense.spec, seed=99)
    for owner, module in defense.named_modules():
        loose = [key for key, value in vars(module).items() if isinstance(value, Tensor)]
        expect(
            not loose,
            f"{name} keeps the tensor {'.'.join(filter(None, [owner, *loose[:1]]))} that is neither saved nor moved to "
            "the device; use register_buffer",
        )
    fit(copy, {key: value.clone() for key, value in defense.state_dict().items()}, Path(name))
    with torch.no_grad():
        expect(
            torch.allclose(defense.predict(x), copy.predict(x), atol=1e-5),
            f"{name} loaded from its own state dict predicts differently; register every module and tensor on self "
            "(nn.ModuleList, register_buffer)",
        )


def check_views_use_the_copy_they_are_called_on(name: str) -> None:
    defense = _built(name)
    x, _ = _images()
    copy = frozen_copy(defense)
    with torch.no_grad():
        before = {view: function(x) for view, function in _views(copy).items()}
        expect(bool(before), f"{name}.views() is empty; return at least one reading of the ensemble")
        for parameter in defense.parameters():
            parameter.zero_()
        for view, function in _views(copy).items():
            expect(
                before[view].shape == (len(x), CLASSES),
                f"view {view!r} of {name} is {_describe(before[view])}; expected ({len(x)}, {CLASSES})",
            )
            check_scores(before[view], len(x), f"view {view!r} of {name}")
            expect(
                torch.equal(function(x), before[view]),
                f"view {view!r} of {name} uses weights that are not self's; build it inside views() from self",
            )


def check_selection_fits_the_members(name: str) -> None:
    defense = _built(name)
    x, _ = _images()
    chosen = defense.selection(x)
    if chosen is not None:
        expected = (len(x), len(defense.members))
        expect(chosen.shape == expected, f"{name}.selection is {_describe(chosen)}; expected {expected}")


def check_trains(name: str) -> None:
    x, y = _images(48)
    trained = _trained(*_training(name, x, y, epochs=1))
    with torch.no_grad():
        check_scores(trained.defense.predict(x), len(x), f"{name}.predict after training")


def check_training_resumes_to_the_same_weights(name: str) -> None:
    spec, data = _training(name, *_images(8), epochs=2)
    alone = _trained(spec, data).defense.state_dict()
    again = stopped_and_resumed(lambda journal: _trained(spec, data, journal), moments=1).defense.state_dict()
    differ = [key for key, value in alone.items() if not torch.equal(value, again[key])]
    expect(
        not differ,
        f"{name} trains to other weights {differ[:1]} when it is stopped after an epoch and another process goes on; "
        "what epochs leave to later ones must be a parameter, a buffer (register_buffer), or a number or text on self",
    )


def _training(name: str, x: Tensor, y: Tensor, epochs: int) -> tuple[TrainSpec, Data]:
    split = Split((x * 255).to(torch.uint8), y)
    data_spec = DataSpec(
        "digits", None, None, None, split.checksum(), split.checksum(), SHAPE, CLASSES, (0.5,), (0.25,)
    )
    setting = Setting(
        data_spec,
        "small_resnet[width=4]",
        3,
        "linf",
        "0.1",
        {"epochs": epochs, "batch_size": len(x) // 2, "augment": "none", "lr": 1e-3, "attack": {"steps": 1}},
    )
    return TrainSpec.create(name, {}, setting), Data("contract", split, split, tuple("abcde"))


def _trained(spec: TrainSpec, data: Data, journal: Journal | None = None) -> Trained:
    prerequisites = {role: build_defense(needed.model) for role, needed in spec.prerequisites.items()}
    return train(spec, data, prerequisites, device="cpu", journal=journal)


def _loss(defense: EnsembleDefense, y: Tensor | None = None) -> list[Any]:
    x, labels = _images()
    labels = labels if y is None else y
    lend_adversary(defense)
    defense.train()
    defense.begin_epoch(0, torch.Generator().manual_seed(0))
    streams = tuple(_images(seed=seed) for seed in range(1, defense.streams))
    result = defense.loss(Batch(x, labels, torch.arange(len(x)), streams, torch.Generator().manual_seed(0)), 0.5)
    return list(result) if hasattr(result, "__next__") else [result]


def _views(defense: nn.Module) -> Mapping[str, Callable[[Tensor], Tensor]]:
    assert isinstance(defense, EnsembleDefense)
    # predict has checks of its own
    return {name: view for name, view in defense.views().items() if name != "predict"}


def _describe(value: Any) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


DEFENSE_CHECKS = [
    check_builds,
    check_tells_its_source,
    check_predict_returns_log_scores,
    check_predict_is_deterministic,
    check_predict_treats_images_alone,
    check_eval_reaches_every_member,
    check_gradient_reaches_the_image,
    check_loss_gives_named_scalars,
    check_loss_reaches_every_member,
    check_labels_do_not_leak_into_predict,
    check_weights_survive_saving,
    check_views_use_the_copy_they_are_called_on,
    check_selection_fits_the_members,
    check_trains,
    check_training_resumes_to_the_same_weights,
]
