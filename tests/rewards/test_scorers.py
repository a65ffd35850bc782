"""Right answers get 1, wrong and unreadable ones 0, at the edges too."""

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ballast.rewards.formats import Format, ValidJson
from ballast.rewards.json_schema import check_schema
from ballast.rewards.scorers import AnyOf, ExactMatch, MultipleChoice, Numeric, normalise_answer


@pytest.mark.parametrize(
    ("text", "reference"),
    [("The Paris.", "paris"), ("ＰＡＲＩＳ", "Paris"), ("don't", "dont"), ("twenty-one", "Twenty one"), ("A", "a"), ("1,000", "1,000.")],
)  # fmt: skip
def test_case_articles_and_punctuation_make_no_difference(text: str, reference: str) -> None:
    assert ExactMatch()(text, reference) == 1.0
    assert ExactMatch(strict=True)(text, reference) == 0.0


@pytest.mark.parametrize(
    ("text", "reference"), [("10.5", "105"), ("-3", "3"), ("C#", "C"), ("Paris, France", "Paris"), ("", "x")]
)
def test_what_means_something_else_is_another_answer(text: str, reference: str) -> None:
    assert ExactMatch()(text, reference) == 0.0


@given(st.text(max_size=100))
def test_normalising_twice_is_normalising_once(text: str) -> None:
    # NFKC before case folding may leave a form that NFKC changes again; compare what both leave.
    once = normalise_answer(text)
    assert ExactMatch()(text, text) == 1.0
    assert "  " not in once
    assert once == once.strip()


def test_the_answer_may_be_looked_for_in_the_last_line_or_anywhere() -> None:
    text = "It lies on the Seine, not in Rome.\n\nParis\n"
    assert [ExactMatch(match)(text, "paris") for match in ("whole", "last_line", "anywhere")] == [0.0, 1.0, 1.0]
    assert ExactMatch("anywhere")(text, "pari") == 0.0  # whole words


def test_a_huge_completion_is_wrong_and_fast() -> None:
    started = time.process_time()
    for scorer, reference in ((ExactMatch(), "x"), (MultipleChoice(), "A"), (Numeric(), "1"), (ValidJson(), None)):
        assert scorer("z " * 10**6, reference) == 0.0
    assert time.process_time() - started < 2.0


@pytest.mark.parametrize("reference", ["B", "(b)", "b.", 1])
def test_a_label_is_a_letter_or_a_place_from_0(reference: Any) -> None:
    assert MultipleChoice()("The answer is (B).", reference) == 1.0
    assert MultipleChoice()("The answer is (C).", reference) == 0.0


@pytest.mark.parametrize(
    ("text", "reference", "right"),
    [
        ("it is 1,000.50", 1000.5, True),
        ("-3/4", "-0.75", True),
        ("50%", 0.5, True),
        ("42", "6 * 7 = 42\n#### 42", True),  # the reference's last number, as in GSM8K
        ("1000001", 1000002, False),
        ("no idea", 1, False),
        ("", 0, False),
    ],
)
def test_numbers_are_compared_by_value(text: str, reference: Any, right: bool) -> None:
    assert Numeric()(text, reference) == float(right)


def test_tolerances_are_inclusive_and_the_larger_holds() -> None:
    # |102 - 100| = 2; relative 0.02 * 100 = 2.
    assert Numeric(tolerance=2)("102", 100) == 1.0
    assert Numeric(tolerance=1)("102", 100) == 0.0
    assert Numeric(tolerance=1, relative_tolerance=0.03)("102", 100) == 1.0


def test_the_best_of_several_references_counts_and_only_the_extracted_part() -> None:
    assert AnyOf(ExactMatch())("USA", ["United States", "USA"]) == 1.0
    tagged = AnyOf(Numeric(), extract="<answer>(.*?)</answer>")
    assert tagged("<answer>1</answer> or\n<answer>\n7 </answer> of 9", 7) == 1.0
    assert tagged("7", 7) == 0.0  # without tags


@pytest.mark.parametrize(
    ("scorer", "reference", "why"),
    [
        (ExactMatch(), "?!", "no word left"),
        (MultipleChoice(), "E", "none of the labels A, B, C, D"),
        (MultipleChoice(), 4, "none of the labels"),
        (Numeric(), "many", "no number"),
    ],
)
def test_a_reference_that_cannot_be_compared_with_says_why(scorer: Any, reference: Any, why: str) -> None:
    assert why in (AnyOf(scorer).problem(reference) or "")
    assert why in (AnyOf(scorer).problem(["A", reference]) or "")
    assert AnyOf(scorer).problem("A" if isinstance(scorer, MultipleChoice) else "1") is None


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ('{"a": [1, {"b": null}]}', True),
        ('```json\n{"a": 1}\n```', True),
        ("3", True),
        ('Here it is: {"a": 1}', False),
        ('{"a": 1', False),
        ('{"a": NaN}', False),
        ("", False),
        ("[" * 100_000, False),  # deeper than the parser can follow
        ("9" * 5000, False),  # longer than Python converts
        ("[" + "1," * 60_000 + "1]", False),  # above the limit of characters
    ],
)
def test_json_is_one_value_and_nothing_else(text: str, valid: bool) -> None:
    assert ValidJson()(text) == float(valid)


def test_required_keys_reach_into_objects() -> None:
    scorer = ValidJson(["name", "address.city"])
    assert scorer('{"name": 1, "address": {"city": 2}}') == 1.0
    assert scorer('{"name": 1, "address": ["city"]}') == 0.0
    assert scorer('["name", "address"]') == 0.0


def test_a_schema_is_held_with_its_patterns_in_time_and_however_deep() -> None:
    nested = {"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"}
    check_schema(nested)
    assert ValidJson(schema=nested)("[[], [[]]]") == 1.0
    assert ValidJson(schema=nested)("[[], [1]]") == 0.0
    assert ValidJson(schema=nested)("[" * 900 + "]" * 900) in (0.0, 1.0)
    slow = ValidJson(schema={"type": "string", "pattern": "^(x|xx)+$"})
    started = time.process_time()
    assert slow('"' + "x" * 200 + 'y"') == 0.0
    assert slow('"xxx"') == 1.0
    assert time.process_time() - started < 1.5


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "objekt"}, "no JSON Schema"),
        ({"pattern": "(a"}, "regex"),
        ({"$ref": "https://example.org/s"}, "leads nowhere"),
        ({"$ref": "#/$defs/none"}, "leads nowhere"),
        ({"patternProperties": {"a": True}}, "not supported"),
    ],
)
def test_a_schema_that_cannot_be_checked_is_refused_before_training(schema: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_schema(schema)


def test_a_format_is_found_or_is_all_of_it() -> None:
    assert Format(r"^Step 1:")("Step 1: heat.") == 1.0
    assert Format(r"\d+", whole=True)(" 12\n") == 1.0
    assert Format(r"\d+", whole=True)("12 eggs") == 0.0
    assert Format("yes", ignore_case=True)("YES") == 1.0
    assert Format("x")("x" * 30_000) == 0.0  # above the limit of characters
