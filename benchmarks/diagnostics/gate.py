"""Whether a gate trusts the experts that withstand an attack: each expert alone, and the weight it is given.

    python benchmarks/diagnostics/gate.py results/published/checkpoints/more-* --norm l2 --eps 1

One line an expert, on the 500 test digits as PGD-50 on the whole mixture leaves them: accuracy of the expert alone
there, its mean weight, its mean weight on the images it gets right; and its accuracy against PGD-50 on itself.
"""

from __future__ import annotations

import argparse

import ensdef
from ensdef.diagnostics import answer, craft, member_roles
from ensdef.loading import attacked_subset, find_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="folders of trained defences that weigh their members")
    parser.add_argument("--norm", default="l2")
    parser.add_argument("--eps", default="1")
    options = parser.parse_args()
    data, _ = find_data("digits")
    test, _ = attacked_subset(data, None)
    x, y = test.x(), test.labels
    settings = {"eps": options.eps, "norm": options.norm, "steps": 50, "step_size": "eps/5"}
    for folder in options.checkpoints:
        defense = ensdef.load_checkpoint(folder)
        x_adv = craft(defense, x, y, **settings)
        answers, roles = answer(defense, x_adv), member_roles(defense, x_adv, y)
        assert answers.selection is not None, f"{folder} does not weigh its members"
        weights = answers.selection.softmax(dim=1)
        print(f"{folder}: {100 * roles.accuracy:.1f} % right, some expert right on {100 * roles.oracle:.1f} %")
        for index, accuracy in enumerate(roles.members):
            right = answers.logits[index].argmax(dim=1) == y
            alone = member_roles(defense, craft(defense, x, y, view=f"member{index}", **settings), y).members[index]
            print(
                f"  expert {index}: {100 * accuracy:5.1f} % right, weight {weights[:, index].mean():.2f} "
                f"({weights[right, index].mean():.2f} where right), {100 * alone:5.1f} % against PGD on itself"
            )


if __name__ == "__main__":
    main()
