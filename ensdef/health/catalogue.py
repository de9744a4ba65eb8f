"""Every flag that a record may carry: when it is raised, what it means, what to do; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from ensdef.errors import UsageError, suggest

#: A finding, in the form of a record's flags.
Finding = dict[str, Any]
Tier = Literal["off", "basic", "full"]
#: From the least that is looked at to the most.
TIERS: tuple[Tier, ...] = get_args(Tier)
Severity = Literal["info", "masking"]

#: Difference between two attacks beyond which the weaker one is no longer merely weak.
BEYOND = 0.1

_ATHALYE = "Athalye, Carlini and Wagner, ICML 2018"
_CARLINI = "Carlini et al., On Evaluating Adversarial Robustness, 2019"
_TRAMER = "Tramer et al., NeurIPS 2020"
_CROCE = "Croce and Hein, ICML 2020"
_PINTOR = "Pintor et al., NeurIPS 2022"


@dataclass(frozen=True)
class Flag:
    """What a flag says.

    Args:
        severity: ``masking``: gradients lie, the number cannot be trusted; ``info``: something to know, such as an
            attack that was too weak; ``either``: masking in its strong form, which ``rule`` tells.
        found: ``basic``, ``full``: by that health report; ``always``: by every evaluation; ``training``: when a
            training ends.
        threshold: what ``value`` is compared with.
        rule: when it is raised.
        source: who proposed the diagnostic.
    """

    name: str
    severity: Literal["info", "masking", "either"]
    found: Literal["basic", "full", "always", "training"]
    threshold: float
    rule: str
    meaning: str
    action: str
    source: str = ""


_FLAGS = [
    # found by every evaluation
    Flag(
        "recount",
        "masking",
        "always",
        0.0,
        "any success that a fresh pass at another batch size does not confirm",
        "a fresh pass at another batch size did not confirm some successes: predictions depend on the batch or are "
        "random",
        "make predict deterministic per image",
    ),
    Flag(
        "nonfinite",
        "masking",
        "always",
        0.0,
        "any NaN or infinity among the scores at a judged point",
        "predict returned NaN or infinity under attack; such images count as fooled",
        "combine members in log space (ensdef.combine)",
    ),
    # found by the basic report
    Flag(
        "zero_gradient",
        "masking",
        "basic",
        0.001,
        "more than 0.1 % of the watched images, while still right, have a gradient that is exactly zero",
        "the gradient that the attack follows is exactly zero on images that it should fool",
        "attack with a margin loss, another view or scores alone; look for rounding, saturation, hard choices",
        f"{_CROCE}; {_CARLINI}",
    ),
    Flag(
        "loss_progress",
        "masking",
        "basic",
        0.2,
        "on more than 20 % of the watched images most early steps give less than a tenth of what the gradient promises",
        "steps along the gradient do not change the scores as the gradient promises",
        "attack with scores alone or with a differentiable stand-in for the part whose backward pass is wrong",
        _PINTOR,
    ),
    Flag(
        "loss_consistency",
        "info",
        "basic",
        0.1,
        "on more than 10 % of the watched images most steps that raise the attack's loss lower the margin of predict",
        "the loss that the attack raises and the decision move in opposite directions",
        "attack predict itself, or a view that decides as predict does",
        _TRAMER,
    ),
    Flag(
        "silent_success",
        "info",
        "basic",
        0.002,
        "with success=last, more than 0.2 % of the images were fooled on the way and right at the end of every run",
        "points on the way fool images that count as robust, because only the end of each run was judged",
        "use success=any",
        _PINTOR,
    ),
    Flag(
        "selector_churn",
        "info",
        "basic",
        0.2,
        "on most watched images the selected member changes in more than 20 % of the steps",
        "the member that is selected changes again and again under attack, so every step follows another gradient",
        "attack views in which the selection is soft, and each member by itself",
    ),
    Flag(
        "saturated_selection",
        "masking",
        "basic",
        0.5,
        "on more than half of the images all weights but one are zero in float32, in a defence that mixes its members",
        "the weights of the members are saturated: the attack sees one member and no way to change the choice",
        "attack the selection before its softmax, or with a higher temperature, and each member by itself",
    ),
    Flag(
        "member_domination",
        "info",
        "basic",
        100.0,
        "on the median image one member's part of the gradient is more than 100 times that of the median member",
        "one member carries nearly all of the gradient: the attack does not see the others",
        "attack the mean of the logits, and each member by itself",
        f"{_TRAMER}; Yu et al. (MORA), NeurIPS 2022",
    ),
    Flag(
        "detached_member",
        "masking",
        "basic",
        0.0,
        "any member whose answer changes predict but through which no gradient flows",
        "predict uses members through which no gradient flows",
        "remove detach(), no_grad and non-differentiable functions between the image and these members",
        _ATHALYE,
    ),
    Flag(
        "idle_member",
        "info",
        "basic",
        0.0,
        "any member whose answers can be exchanged between images without a change of predict",
        "members take no part in the answer: predict ignores them, or they say the same of all images",
        "remove them, or train again; they count as members in the table",
    ),
    Flag(
        "nondeterministic",
        "masking",
        "basic",
        1e-4,
        "two passes over the same batch differ by more than 1e-4 of the largest score",
        "predict gives two answers to the same images",
        "average over the randomness in predict, or attack its expectation; a single draw is no verdict",
        _CROCE,
    ),
    Flag(
        "batch_dependent",
        "masking",
        "basic",
        1e-4,
        "an image's scores differ by more than 1e-4 of the largest score when it meets other images, or another order",
        "the answer to an image depends on the other images of its batch",
        "use stored statistics; predict must treat each image by itself",
        _CROCE,
    ),
    Flag(
        "stale_answer",
        "masking",
        "basic",
        1e-4,
        "new images written into the same memory get the answers of the old ones",
        "predict answers from a memory of earlier calls",
        "remove the cache, or key it by content",
    ),
    Flag(
        "train_mode",
        "either",
        "basic",
        0.0,
        "info: the whole model was in train mode; masking: only parts of it were, or they refuse eval mode",
        "parts that behave differently in training (batch norm, dropout) were in train mode; the attack ran in eval "
        "mode where the model allows it",
        "call model.eval(), and look for parts that switch themselves back",
        _CROCE,
    ),
    Flag(
        "attack_warning",
        "info",
        "basic",
        0.0,
        "any warning of the attack itself",
        "the attack warned",
        "read the warning; it often names the property of the model that misleads the attack",
        _CROCE,
    ),
    Flag(
        "clean_accuracy",
        "info",
        "basic",
        0.0,
        "clean accuracy within three standard errors of chance, or below",
        "the model answers clean images no better than chance: robust accuracy says nothing",
        "check normalisation, the order of classes and the checkpoint",
        _CARLINI,
    ),
    Flag(
        "uncertain",
        "info",
        "basic",
        0.1,
        "the 95 % interval of the robust accuracy is wider than 10 points",
        "too few images: the 95 % interval of the robust accuracy is wide",
        "attack more images (--samples)",
        _CARLINI,
    ),
    Flag(
        "unexamined",
        "info",
        "always",
        0.0,
        "an examination raised an error",
        "health could not be examined",
        "run `ensdef check` on the method, or call predict on a few images by hand",
    ),
    # found by the full report
    Flag(
        "one_step_beats_iterative",
        "masking",
        "full",
        0.005,
        "one step of the whole radius fools 0.5 points more images than 20 steps do, image by image",
        "one gradient step fools images that many steps do not",
        "the loss surface is rough: attack with scores alone, or with an average over nearby gradients",
        _ATHALYE,
    ),
    Flag(
        "black_box_beats_gradient",
        "masking",
        "full",
        0.005,
        "a search on scores adds at least 0.5 % of successes to all gradient attacks together",
        "an attack that sees scores alone fools images that no gradient attack fools",
        "report the union with attacks on scores and decisions",
        f"{_ATHALYE}; {_CARLINI}; {_CROCE}",
    ),
    Flag(
        "unbounded_survivors",
        "masking",
        "full",
        0.01,
        "more than 1 % of the images withstand an attack that may turn every image grey",
        "images stay right under an attack of practically unbounded size",
        "no accuracy of this model under gradient attacks can be trusted; look for zero or wrong gradients",
        f"{_ATHALYE}; {_CARLINI}",
    ),
    Flag(
        "distortion_helps",
        "masking",
        "full",
        0.002,
        "robust accuracy rises by more than 0.2 points with the radius, or more than 5 % of the images flip back",
        "a larger radius leaves more images right, although it contains the smaller one",
        "attack with restarts from the points found at smaller radii, and with scores alone",
        f"{_ATHALYE}; {_CARLINI}",
    ),
    Flag(
        "random_search",
        "masking",
        "full",
        0.005,
        "random points of the ball fool more than 0.5 % of the images that all gradient attacks leave right",
        "random points fool images that gradients do not",
        "attack with scores alone; look for zero or wrong gradients",
        f"{_ATHALYE}; {_CARLINI}",
    ),
    Flag(
        "step_convergence",
        "either",
        "full",
        0.005,
        "doubling the steps costs more than 0.5 points (masking: more than 10)",
        "more steps fool more images: the attack has not converged",
        "use more steps",
        _CARLINI,
    ),
    Flag(
        "restart_convergence",
        "either",
        "full",
        0.003,
        "doubling the restarts from 5 costs more than 0.3 points (masking: more than 10)",
        "more restarts fool more images: the attack has not converged",
        "use more restarts",
        _CARLINI,
    ),
    Flag(
        "step_size",
        "either",
        "full",
        0.005,
        "another step size fools 0.5 points more than eps/5 does (masking: more than 10)",
        "another step size fools more images",
        "use the better step size, or an attack that adapts it",
        _CARLINI,
    ),
    Flag(
        "gradient_correctness",
        "masking",
        "full",
        0.05,
        "autograd differs from central differences by more than 5 % (median), or in sign in more than 10 % of random "
        "directions, on more than 10 % of the images",
        "the gradient is not the slope of the loss",
        "find the part whose backward pass is not the derivative of its forward pass: detach, straight-through "
        "estimators, custom functions",
        f"{_ATHALYE}; {_TRAMER}",
    ),
    Flag(
        "loss_choice",
        "either",
        "full",
        0.01,
        "a margin or targeted loss fools 1 point more than cross-entropy at the same budget (masking: more than 10)",
        "another loss fools more images than cross-entropy",
        "attack with the margin loss and with targeted losses as well",
        f"{_CARLINI}; {_TRAMER}; {_CROCE}",
    ),
    Flag(
        "selector_oracle_gap",
        "info",
        "full",
        0.2,
        "on attacked images some member is right 20 points more often than the selected one",
        "on attacked images a right member is there, but is not selected: the selector is the weak part",
        "attack the selector on purpose",
    ),
    Flag(
        "member_transfer",
        "masking",
        "full",
        0.005,
        "examples made for single members add at least 0.5 % of successes to all gradient attacks on predict",
        "attacks on single members fool the ensemble where attacks on the ensemble itself do not",
        "attack the views of the members as well",
        f"{_CARLINI}; {_TRAMER}",
    ),
    Flag(
        "precision",
        "masking",
        "full",
        0.005,
        "in float64 more than 0.1 % of the decisions change, or an attack fools 0.5 points more or fewer",
        "float32 decides: in float64 the model answers, or falls, differently",
        "combine members in log space, and keep scores of moderate size",
        _CARLINI,
    ),
    Flag(
        "control_failed",
        "info",
        "full",
        0.1,
        "the attack misses the exact robust accuracy of a linear model by more than 10 points",
        "the attack, as it was set, does not reach the known answer on a linear model",
        "use more steps or a larger step size",
        _CARLINI,
    ),
    # found when a training ends
    Flag(
        "dead_member",
        "info",
        "training",
        0.0,
        "a member's accuracy on training images within three standard errors of chance (the threshold), or below",
        "members answer clean training images no better than chance",
        "train longer, or with a lower learning rate or training radius",
    ),
    Flag(
        "expert_collapse",
        "info",
        "training",
        0.98,
        "one member is selected on more than 98 % of the training images",
        "one member is selected on nearly every training image",
        "try another seed, or hyper-parameters under which members compete for longer",
    ),
    Flag(
        "catastrophic_overfitting",
        "info",
        "training",
        0.2,
        "PGD-20 fools 20 points more training images than the training's own attack",
        "the defence learned to defeat its training attack",
        "give the inner attack more steps or a random start (training: attack.steps, attack.start)",
        "Wong, Rice and Kolter, ICLR 2020",
    ),
    Flag(
        "exploding_term",
        "info",
        "training",
        1e4,
        "the mean of a loss term grew a hundredfold since its first epoch, or beyond 10,000",
        "a loss term became very large",
        "lower the learning rate or the weight of that term",
    ),
]

#: Every known flag by name.
FLAGS: dict[str, Flag] = {flag.name: flag for flag in _FLAGS}


def finding(
    name: str,
    value: float,
    detail: str = "",
    *,
    severity: Severity | None = None,
    threshold: float | None = None,
    action: str | None = None,
) -> Finding:
    """A finding with the catalogue's words.

    Args:
        value: what was measured, compared with the threshold.
        detail: what was seen on this model, added to the meaning.
        severity: for flags whose severity is ``either``.
        threshold, action: in place of the catalogue's.
    """
    flag = FLAGS[name]
    return {
        "flag": name,
        "severity": severity or ("info" if flag.severity == "either" else flag.severity),
        "value": float(value),
        "threshold": flag.threshold if threshold is None else threshold,
        "meaning": f"{flag.meaning}: {detail}" if detail else flag.meaning,
        "action": action or flag.action,
    }


def graded(value: float) -> Severity:
    """Severity of a difference between two attacks: masking beyond 10 points only."""
    return "masking" if value > BEYOND else "info"


def explanation(name: str) -> str:
    """What a flag means and what to do, for the screen.

    Raises:
        UsageError: unknown flag.
    """
    if name not in FLAGS:
        raise UsageError(suggest("flag", name, FLAGS))
    flag = FLAGS[name]
    severity = {
        "info": "info (something to know; the number stands)",
        "masking": "masking (gradients lie, or the answer cannot be trusted)",
        "either": "info or masking",
    }[flag.severity]
    found = {
        "basic": "every evaluation, unless --health off",
        "full": "--health full",
        "always": "every evaluation",
        "training": "the end of a training",
    }[flag.found]
    lines = [
        flag.name,
        f"  severity   {severity}",
        f"  found by   {found}",
        f"  raised     {flag.rule}",
        f"  meaning    {flag.meaning}",
        f"  what to do {flag.action}",
    ]
    return "\n".join([*lines, f"  source     {flag.source}"] if flag.source else lines)
