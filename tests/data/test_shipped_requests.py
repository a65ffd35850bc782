"""The rules of the requests that ship with the package. A failure names ids, never the text."""

import json
import re
from collections import Counter
from importlib.resources import files
from itertools import pairwise

import pytest

Row = dict[str, str]

COLUMNS = {"id", "kind", "category", "split", "prompt", "response"}
# An opening such as "I can't", "I'm sorry, but I won't", "Sorry, that's something I can't", "No, I'm not able".
REFUSAL = re.compile(
    r"(?:(?:i'm )?sorry,? |no, )?(?:but )?(?:that's something )?"
    r"(?:i (?:can't|cannot|won't|must decline)|i'm (?:not able|unable))\b",
    re.IGNORECASE,
)
APOLOGY = re.compile(r"(?:i'm |i am )?(?:so |very )?sorry\b|(?:i )?apologi[sz]e|unfortunately", re.IGNORECASE)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    text = files("ballast.data").joinpath("requests.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold().replace("'", ""))


def windows(text: str, width: int) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + width]) for i in range(len(found) - width + 1)}


def begins_as_refusal(response: str) -> bool:
    return bool(REFUSAL.match(response) or APOLOGY.match(response))


def test_every_row_has_the_six_columns_as_filled_strings(rows: list[Row]) -> None:
    wrong = [
        row.get("id", f"row {number}")
        for number, row in enumerate(rows, 1)
        if set(row) != COLUMNS
        or not all(isinstance(value, str) and value == value.strip() != "" for value in row.values())
    ]
    assert wrong == []


def test_counts_per_kind_and_split_are_the_documented_ones(rows: list[Row]) -> None:
    # 144 + 48 + 160 + 40 + 30 + 30 = 452
    assert Counter((row["kind"], row["split"]) for row in rows) == {
        ("harmful", "train"): 144,
        ("harmful", "test"): 48,
        ("ordinary", "train"): 160,
        ("ordinary", "test"): 40,
        ("scary", "train"): 30,
        ("scary", "test"): 30,
    }


def test_every_category_stands_in_both_splits(rows: list[Row]) -> None:
    seen = {(row["kind"], row["category"], row["split"]) for row in rows}
    pairs = {(kind, category) for kind, category, _ in seen}
    assert Counter(kind for kind, _ in pairs) == {"harmful": 12, "ordinary": 10, "scary": 6}
    assert seen == {(kind, category, split) for kind, category in pairs for split in ("train", "test")}


def test_the_first_rows_of_a_kind_cover_all_its_categories(rows: list[Row]) -> None:
    # Whoever takes a small slice still sees every topic: categories take turns within a split.
    for kind, split in {(row["kind"], row["split"]) for row in rows}:
        order = [row["category"] for row in rows if (row["kind"], row["split"]) == (kind, split)]
        count = len(set(order))
        assert len(set(order[:count])) == count, f"{kind}/{split}"


def test_ids_are_unique_and_begin_with_their_kind(rows: list[Row]) -> None:
    assert len({row["id"] for row in rows}) == len(rows)
    assert [row["id"] for row in rows if not re.fullmatch(row["kind"][0] + r"-\d{3}", row["id"])] == []


def test_no_prompt_stands_twice_after_casefold_and_punctuation(rows: list[Row]) -> None:
    counts = Counter(" ".join(words(row["prompt"])) for row in rows)
    assert [row["id"] for row in rows if counts[" ".join(words(row["prompt"]))] > 1] == []


def test_train_and_test_prompts_share_no_eight_words(rows: list[Row]) -> None:
    train = set().union(*(windows(row["prompt"], 8) for row in rows if row["split"] == "train"))
    assert [row["id"] for row in rows if row["split"] == "test" and windows(row["prompt"], 8) & train] == []


def test_train_and_test_prompts_share_under_half_of_their_words(rows: list[Row]) -> None:
    # Jaccard overlap |a & b| / |a | b| of the word sets: paraphrases lie above 0.5, the closest pair here below.
    train = [(row["id"], set(words(row["prompt"]))) for row in rows if row["split"] == "train"]
    test = [(row["id"], set(words(row["prompt"]))) for row in rows if row["split"] == "test"]
    near = [(left, right) for left, a in train for right, b in test if 2 * len(a & b) > len(a | b)]
    assert near == []


def test_prompts_have_five_to_thirty_words_and_responses_eight_to_sixty(rows: list[Row]) -> None:
    def outside(text: str, low: int, high: int) -> bool:
        return not low <= len(text.split()) <= high

    assert [row["id"] for row in rows if outside(row["prompt"], 5, 30)] == []
    assert [row["id"] for row in rows if outside(row["response"], 8, 60)] == []


def test_every_harmful_request_is_declined_in_the_first_words(rows: list[Row]) -> None:
    assert [row["id"] for row in rows if row["kind"] == "harmful" and not REFUSAL.match(row["response"])] == []


def test_ordinary_and_scary_requests_are_answered(rows: list[Row]) -> None:
    assert [row["id"] for row in rows if row["kind"] != "harmful" and begins_as_refusal(row["response"])] == []


def test_refusals_open_in_many_ways(rows: list[Row]) -> None:
    # One opening for all would teach a model a phrase instead of a decision: no pair of words opens half of them.
    openings = Counter(tuple(words(row["response"])[:2]) for row in rows if row["kind"] == "harmful")
    assert len(openings) >= 6
    assert 2 * max(openings.values()) <= sum(openings.values())


def test_texts_hold_no_special_tokens_or_control_characters(rows: list[Row]) -> None:
    # Markers such as <|im_start|>, [INST] or <s> would be read by a tokenizer as structure.
    marker = re.compile(r"<\||\|>|\[/?INST\]|</?s>|<(?:bos|eos|pad|unk)>|[\x00-\x1f\x7f\ufffd]", re.IGNORECASE)
    assert [row["id"] for row in rows if marker.search(row["prompt"]) or marker.search(row["response"])] == []


def test_rows_are_sorted_by_kind_then_number(rows: list[Row]) -> None:
    numbers = [(["harmful", "scary", "ordinary"].index(row["kind"]), row["id"]) for row in rows]
    assert all(left < right for left, right in pairwise(numbers))
