"""An audit counts what a guard said of a data set, and never takes silence for harmlessness."""

import json

from ballast.guardrails.audit import ScoredRow, audit, audit_markdown
from ballast.guardrails.licences import APACHE
from ballast.guardrails.types import RiskTrace


def row(line, *risk, group=None, cuts=None, **more):
    reason = "the guard was busy 12 times" if None in risk else None
    return ScoredRow(
        line, f"r{line}", RiskTrace(cuts or tuple(range(10, 10 * len(risk) + 1, 10)), risk, reason, **more), group
    )


def look(*rows, threshold=0.5):
    return audit(rows, "guard", APACHE, threshold)


def test_a_row_is_risky_from_the_threshold_on_at_any_of_its_cuts():
    found = look(row(1, 0.1, 0.5, 0.2), row(2, 0.49, 0.49))
    assert (found.total.rows, found.total.risky, found.total.unscored) == (2, 1, 0)
    assert found.total.share == 0.5


def test_an_unscored_cut_leaves_a_row_unjudged_unless_another_cut_is_risky():
    # Row 1 might have been risky where nobody looked; row 2 is, whatever the missing cut would say.
    found = look(row(1, 0.1, None), row(2, 0.9, None), row(3, None), row(4, 0.2))
    assert (found.total.risky, found.total.unscored) == (1, 2)
    # One of the two that were judged, not one of four.
    assert found.total.share == 0.5
    assert sum(found.histogram) == 2


def test_nothing_judged_has_no_share_and_no_page_fails():
    found = look(row(1, None))
    assert found.total.share is None
    assert found.quantiles == {}
    assert "–" in audit_markdown(found, "data")


def test_reasons_that_differ_in_numbers_alone_are_one():
    two = [
        ScoredRow(n, str(n), RiskTrace.unscored((5,), f"the prompt has {n * 1000} tokens, the guard reads 512"))
        for n in (1, 2)
    ]
    assert look(*two).reasons == {"the prompt has N tokens, the guard reads N": 2}


def test_the_histogram_has_ten_bins_and_1_is_in_the_last():
    found = look(row(1, 0.0), row(2, 0.05), row(3, 0.95), row(4, 1.0))
    assert found.histogram == (2, 0, 0, 0, 0, 0, 0, 0, 0, 2)


def test_categories_of_the_data_are_counted_apart_the_riskiest_first():
    found = look(row(1, 0.9, group="b"), row(2, 0.1, group="b"), row(3, 0.1, group="a"), row(4, None, group="c"))
    assert list(found.groups) == ["b", "a", "c"]
    assert found.groups["b"].share == 0.5
    assert found.groups["c"].share is None


def test_the_guards_category_is_that_of_the_riskiest_cut_of_risky_rows():
    found = look(row(1, 0.6, 0.9, category=("hate", "theft")), row(2, 0.1, category=("fraud",)))
    assert found.categories == {"theft": 1}


def test_riskiest_rows_are_named_by_id_with_the_first_cut_over_the_threshold():
    found = look(row(1, 0.2, 0.3), row(2, 0.1, 0.7, 0.9))
    assert [(r.id, r.line, r.risk, r.cut, r.length) for r in found.riskiest] == [
        ("r2", 2, 0.9, 20, 30),
        ("r1", 1, 0.3, 20, 20),
    ]
    # Over the threshold after 20 of 30 characters.
    assert found.onset == 20 / 30


def test_empty_responses_and_low_label_mass_are_counted():
    found = look(row(1, 0.1, cuts=(0,)), row(2, 0.1, label_mass=0.4), row(3, 0.1, label_mass=0.95))
    assert (found.empty, found.lowest_label_mass, found.low_label_mass) == (1, 0.4, 1)


def test_the_page_lists_twenty_at_most_and_a_strange_id_breaks_no_table():
    rows = [row(n, 0.9, group=f"g{n}") for n in range(30)]
    strange = ScoredRow(99, "a|b\n| c `d`" + "x" * 200, RiskTrace((5,), (1.0,)))
    page = audit_markdown(look(*rows, strange), "data|set")
    assert "... and 10 more, in the JSON file." in page
    (line,) = [line for line in page.splitlines() if line.startswith(r"| a\|b \| c \`d\`xxx")]
    assert line.replace(r"\|", "").count("|") == 6  # five cells
    assert len(line) < 120


def test_the_json_holds_every_figure():
    values = json.loads(json.dumps(look(row(1, 0.9, group="a"), row(2, 0.1)).to_dict()))
    assert values["total"] == {"rows": 2, "risky": 1, "unscored": 0, "share": 0.5}
    assert values["groups"]["a"]["share"] == 1.0
    assert values["licence"]["name"] == "Apache-2.0"
