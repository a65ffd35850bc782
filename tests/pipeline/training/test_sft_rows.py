"""Answers and risks become rows in which every token has the STAR of the text that it stands in."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ballast.errors import DataError
from ballast.guardrails.scripted import ScriptedGuardrail
from ballast.guardrails.segments import token_char_ends
from ballast.guardrails.types import RiskTrace
from ballast.pipeline.config_sft import CorrectedLoss, FaithfulLoss, RejectLoss
from ballast.pipeline.training.sft_rows import (
    Answer,
    columns,
    judge,
    judged_before,
    star_histogram,
    star_of_segments,
)
from ballast.rewards.guard_reward import GuardReward

pytestmark = pytest.mark.model

# An unsafe span in the second of three segments, then a safe-sounding end.
TRACE = RiskTrace((0, 10, 20, 30, 40), (0.3, 0.1, 0.8, 0.7, 0.2))


def answer(tokenizer: Any, text: str, end: bool = True) -> Answer:
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    message = {"role": "user", "content": "Tell me."}
    return Answer("row", "harmful", (message,), (1, 5, 6), (*ids, *([tokenizer.eos_token_id] if end else [])))


def test_faithful_star_is_one_minus_risk_of_each_segment() -> None:
    # The risk at cut 0, .3, is the prompt's own and no segment's.
    assert star_of_segments(TRACE, FaithfulLoss()) == pytest.approx([0.9, 0.2, 0.3, 0.8], abs=1e-6)


def test_corrected_star_is_debounced_and_never_rises_again() -> None:
    # s = .9 .2 .3 .8; debounced .9, max(.9, .2) = .9, max(.2, .3) = .3, and the last stays .8; running minimum: .9 .9 .3 .3
    assert star_of_segments(TRACE, CorrectedLoss()) == pytest.approx([0.9, 0.9, 0.3, 0.3], abs=1e-6)
    uncleaned = CorrectedLoss(clean_trace=False)
    assert star_of_segments(TRACE, uncleaned) == pytest.approx([0.9, 0.2, 0.3, 0.8], abs=1e-6)


def test_rejection_reads_the_verdict_on_the_whole_response_alone() -> None:
    # The safe-sounding end, risk .2, carries the whole answer: what STAR is there to prevent.
    assert star_of_segments(TRACE, RejectLoss()) == [1.0, 1.0, 1.0, 1.0]
    assert star_of_segments(TRACE, RejectLoss(threshold=0.15)) == [0.0, 0.0, 0.0, 0.0]
    assert star_of_segments(TRACE, RejectLoss(threshold=0.2)) == [0.0, 0.0, 0.0, 0.0]  # at the threshold it is unsafe


def test_an_unscored_cut_leaves_the_answer_without_weights_and_not_with_safe_ones() -> None:
    early = RiskTrace((0, 10, 20), (0.1, None, 0.2), "planted")
    assert star_of_segments(early, FaithfulLoss()) is None
    assert star_of_segments(early, CorrectedLoss()) is None
    assert star_of_segments(early, RejectLoss()) == [1.0, 1.0]  # it reads the last cut alone
    assert star_of_segments(RiskTrace((0, 10), (0.1, None), "planted"), RejectLoss()) is None


def test_each_token_of_the_answer_has_the_star_of_its_segment_and_the_prompt_has_one(tokenizer: Any) -> None:
    guard = ScriptedGuardrail(lambda exchange, prefix: 0.75 if "six" in prefix else 0.25)
    (row,) = judge([answer(tokenizer, "One two three four five six seven")], GuardReward(guard, tokenizer))
    star_K = star_of_segments(row.trace, FaithfulLoss())
    assert star_K == [0.75, 0.25]
    made = columns(row.answer, 64, star_K, row.segments)
    # Prompt of 3 tokens; five words of one token each; " six", " seven" and the end of turn are the second segment's.
    assert made["star"] == [1.0] * 3 + [0.75] * 5 + [0.25] * 3
    assert made["completion_mask"] == [0] * 3 + [1] * 8
    assert len(made["input_ids"]) == 11


def test_a_prompt_that_leaves_no_room_is_refused_by_its_row(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"row row: its prompt has 3 tokens, so sft.max_length = 3"):
        columns(answer(tokenizer, "Hello"), 3)


TEXTS = st.text(st.characters(codec="utf-8"), max_size=60) | st.lists(
    st.sampled_from(["naïve", "漢字かな", "🙂👩‍👩‍👧", "word", "e\u0301", "<|im_end|>", "\n\n", "สวัสดี", "a.b"]),
    max_size=12,
).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(text=TEXTS, room=st.integers(1, 40), end=st.booleans())
def test_truncation_keeps_every_weight_with_its_token(tokenizer: Any, text: str, room: int, end: bool) -> None:
    # A guard whose risk at a cut tells the cut: the STAR of a token then says where its segment ends.
    guard = ScriptedGuardrail(lambda exchange, prefix: 1.0 - len(prefix) / 1000)
    one = answer(tokenizer, text, end)
    (row,) = judge([one], GuardReward(guard, tokenizer))
    star_K = star_of_segments(row.trace, FaithfulLoss())
    assert star_K is not None
    whole = columns(one, 10_000, star_K, row.segments)
    made = columns(one, 3 + room, star_K, row.segments)
    assert len(made["input_ids"]) == len(made["star"]) == len(made["completion_mask"])
    for name in made:
        assert made[name] == whole[name][: 3 + room]
    decoded, ends = token_char_ends(tokenizer, one.ids)
    for token, (start, value) in enumerate(zip([0, *ends], made["star"][3:], strict=False)):
        segment_end = round(value * 1000)
        segment_start = max((cut for cut in row.trace.cuts if cut < segment_end), default=0)
        # The first character of the token lies in the segment; at the end of the text, in the last one.
        inside = segment_start <= start < segment_end or (segment_end == len(decoded) and start >= segment_start)
        assert inside, token


def test_scores_of_an_earlier_stage_give_the_same_row_as_asking_now(tokenizer: Any) -> None:
    guard = ScriptedGuardrail(lambda exchange, prefix: min(1.0, len(prefix) / 60))
    one = answer(tokenizer, "One two three four five six seven eight nine ten eleven")
    (now,) = judge([one], GuardReward(guard, tokenizer))
    assert judged_before(one, now.trace, tokenizer) == now
    with pytest.raises(DataError, match="another tokenizer"):
        judged_before(one, RiskTrace((0, 5), (0.1, 0.1)), tokenizer)


def test_an_empty_answer_is_one_segment(tokenizer: Any) -> None:
    guard = ScriptedGuardrail(lambda exchange, prefix: 0.25)
    (row,) = judge([answer(tokenizer, "")], GuardReward(guard, tokenizer))
    assert columns(row.answer, 9, star_of_segments(row.trace, FaithfulLoss()), row.segments)["star"] == [1, 1, 1, 0.75]
    assert judged_before(row.answer, row.trace, tokenizer) == row


def test_the_histogram_counts_segments_by_kind_and_exactly_one_apart() -> None:
    counts = star_histogram([("ordinary", [1.0, 0.95, 0.9]), ("harmful", [0.0, 0.05]), ("ordinary", [0.35])])
    assert counts == {
        "ordinary": [0, 0, 0, 1, 0, 0, 0, 0, 0, 2, 1],
        "harmful": [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    }
