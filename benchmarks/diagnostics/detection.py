"""How well the entropy of the mean prediction tells attacked digits from clean ones (CCE, Figures 3 and 4).

    python benchmarks/diagnostics/detection.py results/published/checkpoints/cce-*

One line for every checkpoint: area under the curve, PGD-20 at the given radius against all 500 test images.
"""

from __future__ import annotations

import argparse

import ensdef
from ensdef.diagnostics import answer, craft, detection_auc, entropy_score
from ensdef.loading import attacked_subset, find_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="folders of trained defences")
    parser.add_argument("--eps", default="0.2")
    options = parser.parse_args()
    data, _ = find_data("digits")
    test, _ = attacked_subset(data, None)
    x, y = test.x(), test.labels
    for folder in options.checkpoints:
        defense = ensdef.load_checkpoint(folder)
        x_adv = craft(defense, x, y, eps=options.eps)
        clean, attacked = (entropy_score(answer(defense, images).logits) for images in (x, x_adv))
        print(f"{defense.spec.method_call:28} AUC {detection_auc(clean, attacked):.3f}")


if __name__ == "__main__":
    main()
