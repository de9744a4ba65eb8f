"""LaTeX tables: what is printed stands in them, and nothing in them is taken for a command."""

from __future__ import annotations

import re

import pytest

from ensdef.latex import escaped, latex_table


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("adv_en", "adv\\_en"),
        ("clean %", "clean \\%"),
        ("67.2 ± 2.1", "67.2 $\\pm$ 2.1"),
        ("{a}&$b#", "\\{a\\}\\&\\$b\\#"),
        ("a\\b~c^d", "a\\textbackslash{}b\\textasciitilde{}c\\textasciicircum{}d"),
        ("eps < 1\nnext", "eps \\textless{} 1 next"),
        ("cce[mode=dm]", "cce[mode=dm]"),
    ],
)
def test_what_latex_would_take_for_commands_is_escaped(text: str, expected: str) -> None:
    assert escaped(text) == expected


ROWS = [{"method": "adv_en", "robust %": "67.2 ± 2.1"}, {"method": "nat", "robust %": "0.0 ± 0.0 [1]"}]


def test_a_table_has_booktabs_rules_a_caption_a_label_and_one_line_a_row() -> None:
    text = latex_table(ROWS, name="mine", title="Mine & yours")
    assert [text.count(f"\\{rule}") for rule in ("toprule", "midrule", "bottomrule")] == [1, 1, 1]
    assert "\\caption{Mine \\& yours}" in text
    assert "\\label{tab:mine}" in text
    body = text[text.index("\\midrule") : text.index("\\bottomrule")]
    assert [line.split(" & ")[0] for line in body.splitlines() if "&" in line] == ["adv\\_en", "nat"]
    assert "method & robust \\% \\\\" in text


def test_bold_cells_are_those_named_and_no_others() -> None:
    text = latex_table(ROWS, name="mine", title="Mine", bold={(0, "robust %")})
    assert re.findall(r"\\textbf\{([^}]*)\}", text) == ["67.2 $\\pm$ 2.1"]


def test_notes_stand_below_the_rules_and_inside_the_table() -> None:
    text = latex_table(ROWS, name="mine", title="Mine", notes=["[1] failed: 100 % of it"])
    assert text.index("\\bottomrule") < text.index("[1] failed: 100 \\% of it") < text.index("\\end{table}")


def test_braces_are_balanced_and_every_row_has_every_column() -> None:
    odd = [{"a_b": "x}{", "c%": "&"}, {"a_b": "\\", "c%": "#"}]
    text = latex_table(odd, name="odd", title="{", notes=["}"], bold={(0, "a_b")})
    plain = re.sub(r"\\[{}&]", "", text)
    assert plain.count("{") == plain.count("}")
    body = plain[plain.index("\\toprule") : plain.index("\\bottomrule")]
    assert [line.count("&") for line in body.splitlines() if line.endswith("\\\\")] == [1, 1, 1]
