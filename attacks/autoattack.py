"""Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks (Croce, Hein; ICML
2020, arXiv:2003.01690), through pyautoattack 0.2.0, the authors' code as a package.

With fewer than ten wrong classes the targeted parts aim at all there are. The DLR losses need three classes, their
targeted form four: below that their parts are left out (with three classes targeted APGD becomes APGD-DLR), which the
attack's warnings say. Its own flags (random, dynamic, no logits, zero gradients, Square ahead) are kept there too.
"""

from __future__ import annotations

from ensdef.attacks._autoattack import AutoAttack

from ensdef.attack import register_attack


@register_attack("autoattack")
class PublishedAutoAttack(AutoAttack):
    """Four parameter-free attacks in a row: APGD-CE, targeted APGD, targeted FAB and Square."""
