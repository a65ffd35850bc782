"""Every shaping mode by hand: a scripted guard, a planted unsafe span, and which token gets what, to 1e-6.

Two completions of one prompt, ten words in five segments of two; a word is a token here. The guard gives the prompt
alone a risk of .2, safe text .1, and text from the planted word on .7. So

    row 0, planted in segment 3:  s_0 .8   s  .9 .9 .3 .3 .3
                   debounced s~  .9 .9 max(.9,.3)=.9 .3 .3       running minimum m  .9 .9 .9 .3 .3
    row 1, safe:                  s_0 .8   s = m  .9 .9 .9 .9 .9

One reward, 1 for row 0 and 0 for row 1: mean .5, standard deviation .707107, Z = +-.5 / .707107 = +-.707107.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ballast.guardrails.scripted import ScriptedGuardrail
from ballast.guardrails.segments import SegmentOptions, cut_response
from ballast.guardrails.types import Exchange, RiskTrace
from ballast.pipeline.config_shaping import ShapingConfig
from ballast.pipeline.training.shaped_advantages import shaped_advantages, violation_rate
from ballast.rewards.advantages import group_zscore
from ballast.rewards.early_stop import stopped_early, tokens_in_loss
from ballast.rewards.guard_reward import ScoredBatch
from ballast.rewards.shaping import before, token_kl
from ballast.rewards.star import clean_trace, pad_segments, segment_scores, spread_to_tokens

PLANTED = "one two three four PLANTED six seven eight nine ten"
SAFE = "one two three four five six seven eight nine ten"
Z = 0.707107
TERMS_OFF = {"drop": {"weight": 0.0}, "gate": {"enabled": False}}


def risk(exchange: Exchange, prefix: str) -> float:
    return 0.7 if "PLANTED" in prefix else 0.1 if prefix else 0.2


def batch(traces: list[RiskTrace], clean: bool = True) -> ScoredBatch:
    scores = segment_scores(traces)
    clean_NK = clean_trace(scores.star_NK, scores.segment_mask_NK) if clean else scores.star_NK
    segments = tuple(tuple(k for k in range(max(1, len(t.cuts) - 1)) for _ in range(2)) for t in traces)
    return ScoredBatch(("",) * len(traces), tuple(traces), segments, scores, clean_NK, 0.0)


def judged(*texts: str, clean: bool = True) -> ScoredBatch:
    exchanges = [Exchange(({"role": "user", "content": "Count."},), text) for text in texts]
    cuts = [(0, *cut_response(text, SegmentOptions(size=2))) for text in texts]
    return batch(ScriptedGuardrail(risk).assess(exchanges, cuts), clean)


def shaped(scored: ScoredBatch, z_N: Any, terms: dict[str, Any], price: float = 0.0) -> torch.Tensor:
    config = ShapingConfig.model_validate(TERMS_OFF | terms)
    rate = violation_rate(scored, config.lagrangian.tau, lambda rows: rows)
    return shaped_advantages(
        config,
        torch.as_tensor(z_N)[:, None].expand_as(scored.clean_NK),
        scored,
        group_size=len(scored.texts),
        gather=lambda rows: rows,
        own=slice(None),
        price=price,
        rate=rate,
    )


def by_hand(
    terms: dict[str, Any], row0: list[float], row1: list[float], price: float = 0.0, clean: bool = True
) -> None:
    scored = judged(PLANTED, SAFE, clean=clean)
    z_N = group_zscore(torch.tensor([1.0, 0.0]), scored.scores.scored_N, 2, 0.1)
    token_NT = spread_to_tokens(shaped(scored, z_N, terms, price), pad_segments(scored.segments, 11))
    expected = torch.tensor([[value for value in row for _ in range(2)] + [0.0] for row in (row0, row1)])
    torch.testing.assert_close(token_NT, expected, atol=1e-6, rtol=0)


def test_nothing_on_is_the_rewards_advantage_at_every_token() -> None:
    by_hand({}, [Z] * 5, [-Z] * 5)


def test_drop_charges_the_segment_where_star_falls() -> None:
    # c_4 = .9 - .3 - .05 = .55; sums .55 and 0, deviation .55 / sqrt 2 = .388909; -.55 / .388909 = -1.414214
    by_hand({"drop": {"weight": 1.0}}, [Z, Z, Z, Z - 1.414214, Z], [-Z] * 5)


def test_drop_without_cleaning_charges_the_planted_segment_itself() -> None:
    # s as it is: c_3 = .9 - .3 - .05 = .55
    by_hand({"drop": {"weight": 1.0}}, [Z, Z, Z - 1.414214, Z, Z], [-Z] * 5, clean=False)


def test_drop_to_go_charges_what_led_there_too_and_nothing_after() -> None:
    by_hand({"drop": {"weight": 0.5, "to_go": True}}, [Z - 0.707107] * 4 + [Z], [-Z] * 5)


def test_potential_credits_what_the_whole_is_worth_beyond_the_text_before() -> None:
    # m_K .3 and .9: deviation .6 / sqrt 2 = .424264. Row 0: (.3 - .8) / .424264 = -1.178511, then
    # (.3 - .9) / .424264 = -1.414214 three times, then (.3 - .3) = 0. Row 1: (.9 - .8) / .424264 = .235702, then 0.
    row0 = [-1.178511, -1.414214, -1.414214, -1.414214, 0.0]
    row1 = [0.235702, 0.0, 0.0, 0.0, 0.0]
    by_hand({"potential": {"weight": 1.0}}, [Z + a for a in row0], [-Z + a for a in row1])


def test_gate_scales_praise_by_star_and_leaves_blame() -> None:
    # .707107 * .9 = .636396; .707107 * .3 = .212132
    by_hand({"gate": {"enabled": True}}, [0.636396] * 3 + [0.212132] * 2, [-Z] * 5)


def test_gate_with_a_threshold() -> None:
    # tau .5: (.9 - .5) / .5 = .8 of .707107 is .565685; .3 is below
    by_hand({"gate": {"enabled": True, "tau": 0.5}}, [0.565685] * 3 + [0.0] * 2, [-Z] * 5)


def test_mask_leaves_nothing_of_the_rewards_from_the_first_unsafe_segment_on() -> None:
    by_hand({"mask": {"enabled": True, "tau": 0.5}}, [Z] * 3 + [0.0] * 2, [-Z] * 5)


def test_lagrangian_weighs_the_rewards_against_the_batchs_rate() -> None:
    # C = 1, 0; rate .5; price 3: (.707107 - 3 * (1 - .5)) / 4 = -.198223; (-.707107 + 3 * .5) / 4 = .198223
    by_hand({"lagrangian": {"enabled": True}}, [-0.198223] * 5, [0.198223] * 5, price=3.0)


def test_lagrangian_presses_on_a_group_that_is_unsafe_as_a_whole() -> None:
    # Two groups of 2, equal rewards; the first is unsafe as a whole: rate .5, price 1: -+(.5) / 2 = -+.25.
    scored = judged(PLANTED, PLANTED, SAFE, SAFE)
    advantage = shaped(scored, torch.zeros(4), {"lagrangian": {"enabled": True}}, price=1.0)
    torch.testing.assert_close(advantage[:, 0], torch.tensor([-0.25, -0.25, 0.25, 0.25]))


def test_the_default_is_gate_and_drop() -> None:
    # .212132 - 1.414214 = -1.202082
    terms = {"gate": {"enabled": True}, "drop": {"weight": 1.0}}
    assert ShapingConfig() == ShapingConfig.model_validate(terms)
    by_hand(terms, [0.636396] * 3 + [-1.202082, 0.212132], [-Z] * 5)


def test_terms_combine_in_one_order() -> None:
    # gate, mask: .636396 x 3, 0, 0; constraint at price 1: (a - .5) / 2 = .068198 x 3, -.25, -.25 and
    # (-.707107 + .5) / 2 = -.103553; drop -1.414214 at 4; potential as above.
    terms = {
        "gate": {"enabled": True}, "mask": {"enabled": True}, "lagrangian": {"enabled": True},
        "drop": {"weight": 1.0}, "potential": {"weight": 1.0},
    }  # fmt: skip
    row0 = [
        0.068198 - 1.178511,
        0.068198 - 1.414214,
        0.068198 - 1.414214,
        -0.25 - 1.414214 - 1.414214,
        -0.25,
    ]
    by_hand(terms, row0, [-0.103553 + 0.235702] + [-0.103553] * 4, price=1.0)


def test_token_kl_is_weighted_by_the_segment_before() -> None:
    # m_{k-1} of row 0: .8 .9 .9 .9 .3. Log ratios 8 (clipped to 5), 2, -2, 0, 1; weight .1:
    # -.1*.2*5 = -.1; -.1*.1*2 = -.02; .02; 0; -.1*.7*1 = -.07
    scored = judged(PLANTED)
    before_NT = spread_to_tokens(before(scored.clean_NK, scored.scores.start_N), torch.arange(5)[None])
    advantage = token_kl(torch.tensor([[8.0, 2.0, -2.0, 0.0, 1.0]]), before_NT, weight=0.1, clip=5.0)
    torch.testing.assert_close(advantage, torch.tensor([[-0.1, -0.02, 0.02, 0.0, -0.07]]), atol=1e-6, rtol=0)


def test_early_stop_keeps_the_unsafe_segment_and_its_charge_and_drops_what_follows() -> None:
    # m falls below .5 in segment 4 of 5, so tokens 0..7 of 10 stay; m_K is .3 either way.
    whole = judged(PLANTED, SAFE)
    stopped = stopped_early(whole, tau=0.5)
    assert tokens_in_loss(stopped, pad_segments(whole.segments, 11)).sum(1).tolist() == [8, 10]
    assert tokens_in_loss(whole, pad_segments(whole.segments, 11)).sum(1).tolist() == [10, 10]
    assert stopped.lowest_star_N.tolist() == pytest.approx([0.3, 0.9])
    advantage = shaped(stopped, torch.zeros(2), {"drop": {"weight": 1.0}})
    torch.testing.assert_close(advantage[0], torch.tensor([0.0, 0.0, 0.0, -1.414214, 0.0]), atol=1e-6, rtol=0)


def test_one_low_segment_alone_stops_nothing_unless_it_is_the_last() -> None:
    cuts = (0, 1, 2, 3)
    alone, at_the_end = RiskTrace(cuts, (0.1, 0.1, 0.9, 0.1)), RiskTrace(cuts, (0.1, 0.1, 0.1, 0.9))
    stopped = stopped_early(batch([alone, at_the_end]), tau=0.5)
    assert stopped.scores.segment_mask_NK.all()


def test_a_later_fall_after_the_stop_is_nobodys() -> None:
    # STAR .9 .4 .4 .1 .1 -> m .9 .9 .4 .4 .1; stopped after segment 3, the fall to .1 never happened.
    scored = stopped_early(batch([RiskTrace((0, 1, 2, 3, 4, 5), (0.1, 0.1, 0.6, 0.6, 0.9, 0.9))]), tau=0.5)
    assert scored.scores.segment_mask_NK.tolist() == [[True, True, True, False, False]]
    assert scored.lowest_star_N.item() == pytest.approx(0.4)


EVERYTHING = {
    "gate": {"enabled": True}, "mask": {"enabled": True}, "lagrangian": {"enabled": True},
    "drop": {"weight": 1.0, "to_go": True}, "potential": {"weight": 1.0},
}  # fmt: skip
RISKS = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=6)


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(RISKS, min_size=3, max_size=3), RISKS)
def test_an_unscored_row_changes_no_other_rows_advantage_and_has_none(
    rows: list[list[float]], other: list[float]
) -> None:
    def trace(risks: list[float], scored: bool = True) -> RiskTrace:
        cuts = tuple(range(len(risks) + 1))
        return RiskTrace(cuts, (0.1, *risks)) if scored else RiskTrace.unscored(cuts, "planted")

    traces = [trace(row) for row in rows]
    z = torch.tensor([0.5, -1.0, 0.5, 0.0])
    with_unscored = shaped(batch([*traces, trace(other, scored=False)]), z, EVERYTHING, price=1.0)
    without = shaped(batch(traces), z[:3], EVERYTHING, price=1.0)
    assert (with_unscored[3] == 0).all()
    torch.testing.assert_close(with_unscored[:3, : without.size(1)], without)


def test_a_scored_row_alone_in_its_group_has_nothing_to_be_scaled_by() -> None:
    scored = batch([RiskTrace((0, 1), (0.1, 0.9)), RiskTrace.unscored((0, 1), "planted")])
    terms = {"drop": {"weight": 1.0}, "potential": {"weight": 1.0}}
    assert shaped(scored, torch.zeros(2), terms).tolist() == [[0.0], [0.0]]
