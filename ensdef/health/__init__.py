"""The health report of an evaluation: whether gradients lie, and whether the attack was too weak.

``catalogue`` lists every flag, ``statistics`` decides what a count may claim (both without torch); ``observer`` looks
over the attack's shoulder, ``basic`` adds a few passes of its own, ``full`` further small attacks.
"""
