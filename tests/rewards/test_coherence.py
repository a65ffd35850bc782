"""The coherence flags on hand-made texts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ballast.rewards.coherence import coherence

PROSE = (
    "To change a flat tire, first park the car on level ground and pull the hand brake. Loosen the nuts before you "
    "lift the car, then raise it with the jack until the wheel turns freely. Take off the wheel, put the spare one "
    "on, and tighten the nuts by hand. Lower the car and tighten them again, one after another across the wheel."
)

GOOD = [
    PROSE,
    "4",
    "Paris.",
    "x = 3 * 4 = 12",
    "I can't help with that.",
    "Café Zoë is open until nine; try the crème brûlée.",
    "Very, very, very good!",
    "- apples\n- pears\n- bread\n- milk\n- eggs",
    "| name | age |\n|------|-----|\n| Ann | 31 |\n| Bob | 44 |",
    "Use this:\n```python\ndef f(n):\n    return [k * k for k in range(n)]\n```\nIt returns the squares.",
    "3 x 1 = 3\n3 x 2 = 6\n3 x 3 = 9\n3 x 4 = 12\n3 x 5 = 15\n3 x 6 = 18\n3 x 7 = 21\n3 x 8 = 24",
    "1. Wash the rice.\n2. Add two cups of water.\n3. Cook it for 15 minutes.\n4. Let it rest, then serve.",
    "Round one gave Jeff 16 - 1 = 15 points. Round two gave Jeff 16 - 3 = 13 points. Round three gave Jeff 16 / 2 = 8 "
    "points. Jeff therefore scored 15 + 13 + 8 = 36 points, plus 4 bonus points, total 40 points, rank 2.",
    "Title\n" + "-" * 60 + "\nThe text under the line is short.",
]

REPEATED = [
    "I like bread. " * 20,
    "The answer is in the box.\n" * 6,
    PROSE + " and then again" * 60,
    "no " * 40,
    "Hmm " + "a" * 200,
]

GIBBERISH = [
    "Das ist ein sehr langer Satz auf Deutsch, der nicht als Englisch gelten darf, weil die Wörter dieser Sprache "
    "andere sind und niemand ihn versteht, ohne Deutsch gelernt zu haben.",
    "Para cambiar una rueda primero hay que aparcar el coche en un lugar llano y poner el freno de mano antes de "
    "aflojar las tuercas con la llave y levantar el coche.",
    "这是一个关于如何更换轮胎的长句子",
    "Чтобы поменять колесо, сначала остановите машину.",
    "xkcd qwrtz zxcv bnmk plkj hgfd sdfg qwrt zxcv trwq",
    "flurb snozzle quib dranta molip verix tando brell crispo zand felik morba talen grist plova denk rasto wimble "
    "kerto jand solip",
    "$$ %% (( )) [[ ]] {{ }} ;; :: ,, .. // \\\\ || && ^^ ~~ a1 $$ %% (( ))",
]


@pytest.mark.parametrize("text", GOOD)
def test_a_readable_answer_carries_no_flag(text: str) -> None:
    flags = coherence(text)
    assert flags.ok, flags
    assert flags.score > 0.5


@pytest.mark.parametrize("text", REPEATED)
def test_a_loop_is_repeated(text: str) -> None:
    flags = coherence(text)
    assert flags.repeated
    assert not flags.ok
    assert flags.score <= 0.5


@pytest.mark.parametrize("text", GIBBERISH)
def test_other_languages_and_symbol_soup_are_not_english(text: str) -> None:
    flags = coherence(text)
    assert flags.gibberish
    assert not flags.repeated
    assert not flags.ok
    assert flags.score <= 0.5


@pytest.mark.parametrize("text", ["", "   \n\t", "...", "***"])
def test_a_text_without_letter_or_digit_is_empty_and_scores_zero(text: str) -> None:
    flags = coherence(text)
    assert flags.empty_or_too_short
    assert not flags.ok
    assert flags.score == 0.0


def test_two_copies_at_the_end_are_a_loop_only_in_a_truncated_answer() -> None:
    # Two turns of 9 words and 2 words of a third: 20 words, 11 of them copies, a share of 0.55.
    # The n-gram view has 17 four-grams of which 9 are distinct, 0.47, so a lead dilutes it: 19 more words.
    passage = "put the flour into a bowl and stir it slowly "
    assert coherence(passage * 2 + "put the", truncated=True).repeated
    lead = "First we look at what was asked for here today while the rest of us are waiting outside in rain. "
    # 19 + 18 words: loop 9 / 37 = 0.24 and four-grams 6 / 34 = 0.18, both below 0.3.
    assert not coherence(lead + passage * 2, truncated=True).repeated


def test_the_loop_share_counts_copies_not_the_first_saying() -> None:
    # Two sayings of 8 words: 16 words, 13 four-grams, too few for the n-gram view. The tail loop holds
    # 16 words of which 8 are a copy: 8 / 16 = 0.5. By itself it takes three copies, so no flag.
    text = "please stir the soup until it looks thick " * 2
    assert not coherence(text, truncated=False).repeated
    assert coherence(text, truncated=True).repeated
    assert coherence(text, truncated=True).score == pytest.approx(1 - 0.5 * 0.5 / 0.3)


@given(st.text(max_size=400), st.booleans())
def test_a_flag_is_set_exactly_when_the_score_is_at_most_half(text: str, truncated: bool) -> None:
    flags = coherence(text, truncated)
    assert 0.0 <= flags.score <= 1.0
    assert flags.ok == (flags.score > 0.5)
