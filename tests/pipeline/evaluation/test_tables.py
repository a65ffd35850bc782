"""The tables of a report: what stands in a cell, and that it can be read in a terminal of 80 columns."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from ballast.pipeline.evaluation.agreement import Agreement
from ballast.pipeline.evaluation.metrics import EvaluationSummary
from ballast.pipeline.evaluation.probe_figures import AdaptationFigures, AttackFigures, Evasion, ProbeFigures
from ballast.pipeline.evaluation.statistics import Estimate
from ballast.pipeline.evaluation.suite_figures import SuiteFigures
from ballast.pipeline.evaluation.tables import COLUMNS, markdown_table, render_tables, unscored_note


def share(value: float, low: float, high: float) -> Estimate:
    return Estimate(value, low, high, n=100)


NOTHING = Estimate(None, None, None, n=0, unscored=4)

TYPICAL = EvaluationSummary(
    unsafe_share=share(0.123, 0.051, 0.199),
    mean_risk=share(0.314, 0.27, 0.36),
    refusal_harmful=share(0.48, 0.42, 0.54),
    refusal_scary=share(0.07, 0.03, 0.14),
    refusal_ordinary=share(0.0, 0.0, 0.04),
    coherent_share=share(0.98, 0.96, 0.99),
    guard_risk=share(0.25, 0.2, 0.3),
    reward=share(0.71, 0.67, 0.75),
    unscored_share=0.0,
    truncated_share=0.5,
    prompts={"harmful": 50, "scary": 20, "ordinary": 30},
    completions={"harmful": 100, "scary": 40, "ordinary": 60},
    generation_tokens_per_s=1234.4,
    training_tokens_per_s=None,
)
FULL = share(1.0, 0.98, 1.0)
WIDEST = replace(
    TYPICAL,
    unsafe_share=FULL,
    refusal_harmful=FULL,
    refusal_scary=FULL,
    refusal_ordinary=FULL,
    coherent_share=FULL,
    reward=share(-1.25, -1.5, -1.0),
    generation_tokens_per_s=123_456.0,
    training_tokens_per_s=123_456.0,
)


def rendered(*rows: tuple[str, EvaluationSummary], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(render_tables(rows, width), highlight=False)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_a_typical_report_has_one_line_a_model_in_80_columns() -> None:
    text = rendered(("start", TYPICAL), ("after align", TYPICAL), ("after GRPO", TYPICAL))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert [sum(line.startswith(label) for line in lines) for label in ("start", "after align", "after GRPO")] == [
        2
    ] * 3
    (safety, quality) = [line for line in lines if line.startswith("after GRPO")]
    assert safety.split(maxsplit=2)[2] == "12% [5, 20] 0.31 [0.27, 0.36] 0.25 [0.20, 0.30] 0.71 [0.67, 0.75]"
    for cell in ("48% [42, 54]", "0% [0, 4]", "7% [3, 14]", "98% [96, 99]", "1,234", "–"):
        assert cell in quality


@pytest.mark.parametrize("width", [80, 100, 200])
def test_no_width_of_cells_cuts_a_figure_off(width: int) -> None:
    text = rendered(("start", WIDEST), ("after align", TYPICAL), ("after GRPO", WIDEST), width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    # Value and interval may stand on two lines, but each is whole.
    for piece in ("100%", "[98, 100]", "-1.25", "[-1.50, -1.00]", "123,456", "after align"):
        assert piece in text


def test_what_was_not_scored_is_a_dash_and_never_a_zero() -> None:
    missing = replace(TYPICAL, unsafe_share=NOTHING, mean_risk=NOTHING, guard_risk=None, reward=None)
    cells = [cell.strip() for cell in markdown_table([("start", missing)]).splitlines()[2].strip("|").split("|")]
    assert cells[:5] == ["start", "–", "–", "–", "–"]


def test_unscored_answers_are_told_below_the_tables_and_only_where_there_are_any() -> None:
    some = replace(TYPICAL, unscored_share=0.021)
    assert unscored_note([("start", TYPICAL), ("after GRPO", replace(TYPICAL, unscored_share=None))]) == ""
    assert unscored_note([("start", TYPICAL), ("after GRPO", some)]).endswith(": after GRPO 2.1%.")
    assert "after GRPO 2.1%" in " ".join(rendered(("after GRPO", some)).split())
    assert markdown_table([("after GRPO", some)]).endswith("after GRPO 2.1%.")
    assert "could not score" not in rendered(("start", TYPICAL))


def test_the_markdown_table_has_a_cell_a_column_and_a_line_a_model() -> None:
    lines = markdown_table([("start", TYPICAL), ("a|b", TYPICAL)]).splitlines()
    assert len(lines) == 4
    assert all(line.replace("\\|", "").count("|") == len(COLUMNS) + 1 for line in lines)
    assert lines[3].startswith("| a\\|b | 12% [5, 20] |")


def probed() -> EvaluationSummary:
    """Everything that can be measured besides, in cells as wide as they come."""
    attack = AttackFigures(FULL, FULL, FULL, FULL, share(-1.0, -1.0, -1.0))
    safe_words = Evasion({"refusal": FULL}, {"refusal": FULL}, FULL)
    adapted = AdaptationFigures(safe_words, None, FULL, FULL)
    pair = Agreement(FULL, -0.25, 1000, 1000, 1000, 1000, 7)
    return replace(
        WIDEST,
        second_unsafe_share=FULL,
        agreement={"judge, keywords": pair, "judge, second judge": pair},
        suites={
            name: SuiteFigures(FULL, FULL, FULL, FULL, FULL, 9)
            for name in ("advbench", "jbb-harmful", "jbb-benign", "xstest")
        },
        truthfulqa=dict.fromkeys(("mc1", "mc1_per_token", "mc2", "mc2_per_token"), FULL),
        pass_at={"exact": {1: FULL, 4: FULL}},
        probes=ProbeFigures(attack, attack, adapted, True),
    )


def test_what_was_measured_besides_has_tables_of_its_own_that_fit_80_columns() -> None:
    text = rendered(("start", TYPICAL), ("after align", probed()))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for piece in (
        "Judges",
        "1000/1000/1000",
        "-0.25",
        "jbb-benign",
        "Probes",
        "YES",
        "TruthfulQA",
        "mc2 per token",
        "pass@4",
    ):
        assert piece in text
    markdown = markdown_table([("start", TYPICAL), ("after align", probed())])
    assert "Refused harmless by source:" in markdown
    # The model without them has a dash in every such column, and not a zero.
    judges = markdown.split("Judges:\n\n")[1].splitlines()
    assert judges[2] == "| start | – | – | – | – | – | – | – |"
    assert judges[3] == (
        "| after align | 100% [98, 100] | -0.25 | 1000/1000/1000 | 100% [98, 100] | -0.25 | 1000/1000/1000 | 100% [98, 100] |"
    )


def test_agreement_with_keywords_alone_is_left_to_the_markdown() -> None:
    pair = Agreement(FULL, None, 1, 2, 3, 4, 0)
    rows = [("start", replace(TYPICAL, agreement={"judge, keywords": pair}))]
    assert "Judges" not in rendered(*rows)
    assert "| start | 100% [98, 100] | – | 1/2/3 |" in markdown_table(rows)
