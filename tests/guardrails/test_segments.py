"""Cuts fall where words end; tokens lie where the decoder puts their text."""

import functools
import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ballast.errors import ConfigError, ModelError
from ballast.guardrails.segments import (
    SegmentOptions,
    cut_response,
    cut_sentences,
    cut_tokens,
    cut_words,
    segment_of_tokens,
    token_char_ends,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
END_OF_TURN = 2


@functools.cache
def embedded_tokenizer():
    from transformers import AutoTokenizer

    from ballast.models import embedded_model

    return AutoTokenizer.from_pretrained(embedded_model())


@functools.cache
def sentencepiece_like_tokenizer():
    """Byte fallback and a stripped first space, as Llama 2's tokenizer decodes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "</s>": 1, **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)}}
    for piece in ["▁", *"abcdehlorw", "▁he", "llo", "▁wor", "ld"]:
        vocabulary[piece] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def assert_laid_over(tokenizer, ids):
    text, ends = token_char_ends(tokenizer, ids)
    assert text == decoded(tokenizer, ids)
    assert len(ends) == len(ids)
    assert all(a <= b for a, b in zip([0, *ends], ends, strict=False))
    slices = [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    assert "".join(slices) == text
    return text, ends, slices


# --- cuts ---------------------------------------------------------------------------------------------


@given(TEXT, st.integers(1, 7), st.sampled_from(["words", "sentences"]))
@example("   \n ", 1, "words")
@example("a b c  ", 1, "words")
def test_cuts_increase_strictly_and_end_at_the_length(text, size, unit):
    cuts = cut_response(text, SegmentOptions(unit=unit, size=size))
    assert cuts[-1] == len(text)
    assert all(a < b for a, b in itertools.pairwise(cuts))
    assert cuts == (0,) or cuts[0] > 0


@given(TEXT, st.integers(1, 7))
def test_the_text_before_every_inner_cut_ends_with_a_word(text, size):
    for cut in cut_words(text, size)[:-1]:
        assert not text[cut - 1].isspace()


def test_five_words_a_segment_and_white_space_goes_with_what_follows():
    text = "one two three four five six  seven "
    # "one two three four five" is 23 characters; the trailing space belongs to the last segment.
    assert cut_words(text, 5) == (23, len(text))
    assert cut_words("one two", 1) == (3, 7)
    assert cut_words("one two  ", 1) == (3, 9)


def test_the_empty_response_has_the_one_cut_0():
    for unit in ("words", "sentences", "tokens"):
        assert cut_response("", SegmentOptions(unit=unit), char_ends=[0]) == (0,)


def test_ideographs_count_as_words_and_keep_their_punctuation():
    # 今天|天气|,很|好。: a comma of ASCII is a word by itself
    assert cut_words("今天天气,很好。", 2) == (2, 4, 6, 8)
    assert cut_words("你好。再见。", 2) == (3, 6)


def test_a_run_without_spaces_is_still_cut():
    cuts = cut_words("x" * 1000, 5)
    assert max(b - a for a, b in zip((0, *cuts), cuts, strict=False)) == 5 * 32


def test_sentences_end_at_marks_line_ends_and_after_fifty_words():
    text = 'He said "no." Version 3.5 is out!\nstep one\nstep two'
    pieces = [text[a:b] for a, b in zip((0, *cut_sentences(text, 1)), cut_sentences(text, 1), strict=False)]
    assert pieces == ['He said "no."', " Version 3.5 is out!", "\nstep one", "\nstep two"]
    assert cut_sentences("w " * 120, 1) == (99, 199, 240)  # 50 words and 49 spaces


def test_token_cuts_skip_places_without_text_of_their_own():
    # The third token has no width: a cut after it is the cut after the second.
    assert cut_tokens([2, 4, 4, 9, 9], 1, 9) == (2, 4, 9)
    assert cut_tokens([0, 0, 3], 2, 3) == (3,)
    with pytest.raises(ConfigError, match="unit='words'"):
        cut_response("abc", SegmentOptions(unit="tokens"))


# --- tokens over characters ---------------------------------------------------------------------------


@pytest.mark.model
@settings(deadline=None)
@given(TEXT, st.integers(0, 10))
@example("👩‍👩‍👧 日本語\n\n```py\nx = {}\n```\t naïve café\x00", 1)
def test_tokens_of_any_text_truncated_anywhere_concatenate_to_their_text(text, dropped):
    tokenizer = embedded_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert_laid_over(tokenizer, ids)
    assert_laid_over(tokenizer, ids[: max(0, len(ids) - dropped)])


@pytest.mark.model
@settings(deadline=None)
@given(st.lists(st.integers(0, 49151), max_size=40))
@example([])
@example([END_OF_TURN])
@example([100_000, 44])  # beyond the vocabulary: a padded embedding can be sampled
def test_any_sampled_ids_concatenate_to_their_text_and_specials_have_no_width(ids):
    tokenizer = embedded_tokenizer()
    _, _, slices = assert_laid_over(tokenizer, ids)
    assert all(slices[i] == "" for i, token in enumerate(ids) if token <= 16)


@pytest.mark.model
def test_a_character_split_over_tokens_belongs_to_the_token_with_its_last_byte():
    tokenizer = embedded_tokenizer()
    ids = tokenizer.encode("a🦙b", add_special_tokens=False)
    text, ends, slices = assert_laid_over(tokenizer, [*ids, END_OF_TURN])
    assert text == "a🦙b"
    assert len(ids) > 3  # the llama is several tokens
    assert slices == ["a", *[""] * (len(ids) - 3), "🦙", "b", ""]
    assert ends[-1] == ends[-2] == 3
    # Cut in the middle of it: what is left becomes one replacement character of the last token.
    text, _, slices = assert_laid_over(tokenizer, [*ids[:-2], END_OF_TURN])
    assert text == "a\ufffd"
    assert slices[-2:] == ["\ufffd", ""]


@pytest.mark.model
def test_the_fast_way_agrees_with_the_definition_on_the_embedded_tokenizer():
    from ballast.guardrails import segments

    tokenizer = embedded_tokenizer()
    text = "Zuerst 日本語, dann 🦙🏔️ and code:\n\tif x:\n\t\treturn 'é'\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    decode = functools.partial(decoded, tokenizer)
    expected = segments._ends_by_prefixes(decode, ids, text)
    assert segments._ends_by_bytes(tokenizer, ids, text) == expected
    assert segments._ends_by_windows(decode, ids, text) == expected


@settings(deadline=None)
@given(st.lists(st.one_of(st.integers(0, 300), st.sampled_from([226, 184, 173, 240, 159, 146, 258, 259])), max_size=25))
@example([2 + 0xE4, 2 + 0xB8, 2 + 0xAD, 2 + 0xE4])  # a whole character, spoilt by a byte that begins another
@example([258, 269, 270, 1, 271, 272])
def test_byte_fallback_and_a_stripped_first_space_are_laid_over_exactly(ids):
    tokenizer = sentencepiece_like_tokenizer()
    ids = [token for token in ids if token < len(tokenizer)]
    _, _, slices = assert_laid_over(tokenizer, ids)
    assert all(slices[i] == "" for i, token in enumerate(ids) if token == 1)


def test_the_window_agrees_with_the_definition_under_byte_fallback():
    from ballast.guardrails import segments

    tokenizer = sentencepiece_like_tokenizer()
    ids = tokenizer.encode("hello world 日本 llo")
    decode = functools.partial(decoded, tokenizer)
    text = decode(ids)
    assert text == "hello world 日本 llo"
    assert segments._ends_by_bytes(tokenizer, ids, text) is None
    assert segments._ends_by_windows(decode, ids, text) == segments._ends_by_prefixes(decode, ids, text)


@settings(deadline=None)
@given(st.lists(st.one_of(st.integers(2, 300), st.sampled_from([226, 184, 173, 230, 186, 175, 258, 259])), max_size=25))
@example([2 + 0xE4, 2 + 0xB8, 2 + 0xAD, 2 + 0xE4])
def test_where_the_window_has_an_answer_it_is_the_definitions(ids):
    from ballast.guardrails import segments

    tokenizer = sentencepiece_like_tokenizer()
    ids = [token for token in ids if token < len(tokenizer)]
    decode = functools.partial(decoded, tokenizer)
    text = decode(ids)
    assert segments._ends_by_windows(decode, ids, text) in (None, segments._ends_by_prefixes(decode, ids, text))


def test_a_decoder_that_prints_specials_all_the_same_is_refused():
    class Printing:
        added_tokens_decoder = {0: type("Added", (), {"special": True})()}  # noqa: RUF012

        def decode(self, ids, **options):
            return "x" * len(ids)

        def convert_ids_to_tokens(self, ids):
            return ["x"] * len(ids)

    with pytest.raises(ModelError, match="end at character 1 of 2"):
        token_char_ends(Printing(), [1, 0])


# --- tokens to segments -------------------------------------------------------------------------------


def test_a_token_belongs_to_the_segment_of_its_first_character():
    # Characters 0..4 | 4..9. Tokens: [0,3) [3,6) spans the cut, [6,9), and the end of turn.
    assert segment_of_tokens([3, 6, 9, 9], (4, 9)) == [0, 0, 1, 1]
    # A token that begins at the cut is in the next segment; so is a character's first byte without width.
    assert segment_of_tokens([4, 4, 9], (4, 9)) == [0, 1, 1]


def test_tokens_of_the_empty_response_belong_to_its_one_segment():
    assert segment_of_tokens([0, 0], (0,)) == [0, 0]
    assert segment_of_tokens([], (0,)) == []


def test_a_leading_zero_cut_is_refused_because_it_owns_no_tokens():
    with pytest.raises(ValueError, match="leading 0"):
        segment_of_tokens([3], (0, 3))
    with pytest.raises(ValueError, match="leading 0"):
        segment_of_tokens([3], ())


@pytest.mark.model
@settings(deadline=None)
@given(TEXT, st.integers(1, 6), st.sampled_from(["words", "sentences", "tokens"]))
def test_segments_of_tokens_never_go_back_and_cover_what_the_tokens_begin(text, size, unit):
    tokenizer = embedded_tokenizer()
    ids = [*tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True), END_OF_TURN]
    text, ends = token_char_ends(tokenizer, ids)
    cuts = cut_response(text, SegmentOptions(unit=unit, size=size), ends)
    segments = segment_of_tokens(ends, cuts)
    assert segments == sorted(segments)
    assert segments[-1] == len(cuts) - 1
    for start, end, k in zip([0, *ends], ends, segments, strict=False):
        if end > start:
            assert (0, *cuts)[k] <= start < cuts[k]
