"""Numbers and labels are read out of prose, or not at all."""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ballast.rewards.extract import chosen_label, last_number
from ballast.rewards.matching import BoundedPattern


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,000.50", Fraction(2001, 2)),
        ("-3/4", Fraction(-3, 4)),
        ("so x = -3.", -3),
        ("5-3", 3),  # a minus after a number subtracts
        ("(5)-3", 3),
        ("50%", Fraction(1, 2)),
        ("0.5 percent", Fraction(1, 200)),
        ("It costs $1,234.50 in all.", Fraction(2469, 2)),
        ("-$5", -5),
        ("$-5", -5),
        ("2 1/2 cups", Fraction(5, 2)),
        ("2½ cups", Fraction(5, 2)),
        ("−5", -5),  # the true minus
        (r"\boxed{-\frac{3}{4}}", Fraction(-3, 4)),
        ("1e-3", Fraction(1, 1000)),
        (r"6.02 \times 10^{23}", 602 * 10**21),
        ("1\u202f000\u202f000", 1_000_000),
        ("٣", 3),
        ("on 12/25/2026", 2026),
        ("version 3.14.15", Fraction(157, 50)),
        ("well...42", 42),
        ("a .5 share", Fraction(1, 2)),
        ("First 3, then 7.", 7),
    ],
)
def test_the_last_number_is_read_exactly(text: str, value: Fraction) -> None:
    assert last_number(text) == value


@pytest.mark.parametrize("text", ["", "none", "H2O", "3/0", "9" * 5000, "1e999999999", "\x00", "🙂"])
def test_what_is_no_value_is_none(text: str) -> None:
    assert last_number(text) is None


@given(st.integers(-(10**30), 10**30), st.integers(1, 10**6))
def test_every_fraction_is_read_back(top: int, bottom: int) -> None:
    assert last_number(f"The result is {top}/{bottom}.") == Fraction(top, bottom)


@given(st.integers(0, 10**30))
def test_thousands_separators_change_nothing(number: int) -> None:
    assert last_number(f"{number:,}") == number == last_number(str(number))


@given(st.text(max_size=300))
def test_any_text_is_read_without_an_error(text: str) -> None:
    assert last_number(text) is None or isinstance(last_number(text), Fraction)
    assert chosen_label(text, "ABCD") in (None, *"ABCD")


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("The answer is (B).", "B"),
        ("B", "B"),
        ("b)", "B"),
        ("**C**", "C"),
        ("B) Paris", "B"),
        ("A", "A"),
        ("A, because it is", "A"),
        (r"so \boxed{C}", "C"),
        ("I think of A first.\n\nD", "D"),
        ("Answer: B because option A is wrong", "B"),
        ("The answer is not A but B", "B"),
        ("The answer is: **(B) Paris**", "B"),
        ("The answer is A. No: the answer is B.", "B"),
        ("The correct option is C, not D.", "C"),
        ("So it is (b)", "B"),
        ("Ｂ", "B"),  # full width
        ("A dog ran by. I say D", "D"),  # "A" and "I" are words here
    ],
)
def test_the_label_that_is_chosen_is_found(text: str, label: str) -> None:
    assert chosen_label(text, "ABCD") == label


@pytest.mark.parametrize("text", ["", "A B C D", "(A), (B)", "A, B, C", "The answer is A or B", "the answer is a dog"])
def test_who_names_several_labels_or_none_chooses_none(text: str) -> None:
    assert chosen_label(text, "ABCD") is None


def test_labels_may_be_words_or_digits() -> None:
    assert chosen_label("Yes, because it rains.", ("yes", "no")) == "yes"
    assert chosen_label("I would say no.", ("yes", "no")) == "no"
    assert chosen_label("yes and no", ("yes", "no")) is None
    assert chosen_label("the answer is 2.", "1234") == "2"


@pytest.mark.parametrize(
    "text",
    ["1," * 10**5, "9" * 10**5, "1/" * 10**5, "(" * 10**5, "answer is " * 10**4, " " * 10**5, "\\frac{" * 10**4, "A or " * 10**4],
)  # fmt: skip
def test_no_text_takes_long(text: str) -> None:
    started = time.process_time()
    last_number(text)
    chosen_label(text, "ABCD")
    assert time.process_time() - started < 1.0


def test_a_pattern_without_end_gives_up_counts_and_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    pattern = BoundedPattern("(a|aa)+$", seconds=0.02)
    started = time.process_time()
    assert not pattern.found("a" * 200 + "b", whole=True)
    assert pattern.last("a" * 200 + "b") is None
    assert time.process_time() - started < 1.0
    assert pattern.given_up == 2
    assert len(caplog.records) == 1
    assert "backtracks without end" in caplog.text
    assert "aaaaaaaaa" not in caplog.text
