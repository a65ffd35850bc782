"""Where to cut a response, and which policy token belongs to which segment.

A *cut* is a character offset where a prefix of the response ends. The cuts c_1 < ... < c_K of a response of
length L end at c_K = L and divide it into K segments: segment k (counted from 0) holds the characters
`cuts[k-1]..cuts[k]`, the first one from 0. White space belongs to the segment that follows it, so that the
text before every cut is the real text and ends with a word; white space at the very end belongs to the last.

The empty response has the one cut (0,). Guards may also be asked for the cut 0 of a longer response (the
prompt's own risk); that cut owns no characters and no tokens, so it is added for the guard and removed
again before anything here: the functions below count segments over cuts *without* a leading 0.

Tokens are laid over the text by decoding the policy's own ids, never by tokenising the text again.

Letters: T policy tokens, K segments.
"""

import bisect
import codecs
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ballast.errors import ConfigError, ModelError

# Chinese characters, kana and their extensions stand for a word each; Thai, Lao, Burmese and Khmer do not
# mark words either, and theirs have about four characters. Hangul is written with spaces.
_IDEOGRAPH = "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U0001b000-\U0001b16f\U00020000-\U0003ffff"
_NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
_CLOSING = "\u3001-\u3003\u3009\u300b\u300d\u300f\u3011\u3015\uff01\uff09\uff0c\uff0e\uff1a\uff1b\uff1f\u2026"
# A run without spaces (base64, a URL, a policy that learnt to leave them out) counts as a word every 32
# characters: no way of writing makes a segment, and so the text between two looks of a guard, unbounded.
_LONGEST_WORD = 32
_WORD = re.compile(
    f"[{_IDEOGRAPH}][{_CLOSING}]*|[{_NO_SPACES}]{{1,4}}|[^\\s{_IDEOGRAPH}{_NO_SPACES}]{{1,{_LONGEST_WORD}}}"
)

_SENTENCE_END = re.compile(
    "[.!?\u2026][\"'\u201d\u2019)\\]]*(?=\\s|$)|[\u3002\uff01\uff1f][\u300d\u300f\u201d\uff09]*|(?<=\\S)(?=[^\\S\\n]*\\n)"
)
_LONGEST_SENTENCE_WORDS = 50


class SegmentOptions(BaseModel):
    """How a response is cut into segments. The default, 5 words, is STAR's (arXiv 2505.17196)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: Literal["words", "sentences", "tokens"] = Field(
        "words", description="What is counted: words, sentences, or the policy's tokens."
    )
    size: int = Field(default=5, ge=1, description="How many units a segment has; the last segment may have fewer.")


def cut_words(text: str, size: int) -> tuple[int, ...]:
    """Cut after every `size` words.

    A word is a run of characters without white space, at most 32 of them; an ideograph or kana is a word of
    its own, and scripts without spaces count four characters as one.

    Returns:
        (K,) strictly increasing offsets, the last one `len(text)`; (0,) for the empty text.
    """
    return _every([match.end() for match in _WORD.finditer(text)], size, len(text))


def cut_sentences(text: str, size: int) -> tuple[int, ...]:
    """Cut after every `size` sentences; a line end ends a sentence, and so do 50 words without any end.

    Returns:
        (K,) strictly increasing offsets, the last one `len(text)`; (0,) for the empty text.
    """
    sentence_ends = {match.end() for match in _SENTENCE_END.finditer(text)}
    ends, words = [], 0
    for match in _WORD.finditer(text):
        words += 1
        # A sentence's end always lies where a word ends, or inside a word ("what?!x"): count it there.
        if words == _LONGEST_SENTENCE_WORDS or not sentence_ends.isdisjoint(range(match.start() + 1, match.end() + 1)):
            ends.append(match.end())
            words = 0
    if words:
        ends.append(len(text))  # what is written last needs no end mark
    return _every(ends, size, len(text))


def cut_tokens(char_ends: Sequence[int], size: int, length: int) -> tuple[int, ...]:
    """Cut after every `size` policy tokens.

    Args:
        char_ends: (T,) where each token ends in the text, from `token_char_ends`.
        size: tokens a segment. Tokens without text of their own (specials, the first bytes of a character)
            count, but two cuts at one place are one.
        length: the length of the text in characters.

    Returns:
        (K,) strictly increasing offsets, the last one `length`; (0,) for the empty text.
    """
    ends = [char_ends[i] for i in range(size - 1, len(char_ends), size)]
    return (*sorted({end for end in ends if 0 < end < length}), length)


def cut_response(text: str, options: SegmentOptions, char_ends: Sequence[int] | None = None) -> tuple[int, ...]:
    """Cut a response as the options say.

    Args:
        text: the response.
        options: unit and size.
        char_ends: (T,) where each policy token ends in `text`; needed for `unit="tokens"` only.

    Returns:
        (K,) strictly increasing offsets, the last one `len(text)`; (0,) for the empty text.

    Raises:
        ConfigError: tokens are to be counted, but `char_ends` is not given.
    """
    if options.unit == "words":
        return cut_words(text, options.size)
    if options.unit == "sentences":
        return cut_sentences(text, options.size)
    if char_ends is None:
        raise ConfigError(
            "segments with unit='tokens' need the policy's token ids, and none are known for this text; use unit='words'"
        )
    return cut_tokens(char_ends, options.size, len(text))


def _every(ends: Sequence[int], size: int, length: int) -> tuple[int, ...]:
    # The last end is replaced by the length, so that trailing white space is no segment of its own.
    return (*ends[size - 1 : -1 : size], length)


def token_char_ends(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[int]]:
    """Decode policy tokens and say where in the text each of them ends.

    A token that ends inside a character ends where that character begins; the token with its last byte gets
    it. Bytes that are no character become U+FFFD, as in `decode`. Token i's own text is
    `text[ends[i-1]:ends[i]]`, and these slices concatenate to the text.

    Args:
        tokenizer: the policy's tokenizer (transformers).
        ids: (T,) token ids as sampled, specials included.

    Returns:
        The text, specials left out and spaces untouched, and (T,) non-decreasing character offsets, the last
        one `len(text)`. A special token has no width.

    Raises:
        ModelError: the tokenizer's decoding is not monotonic, so its tokens have no place in the text.
    """
    ids = [int(token) for token in ids]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    plain = [i for i, token in enumerate(ids) if token not in special]

    def decode(tokens: Sequence[int]) -> str:
        return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    text = decode(ids)
    plain_ids = [ids[i] for i in plain]
    plain_ends = _ends_by_bytes(tokenizer, plain_ids, text)
    if plain_ends is None:
        plain_ends = _ends_by_windows(decode, plain_ids, text)
    if plain_ends is None:
        plain_ends = _ends_by_prefixes(decode, plain_ids, text)
    ends, reached = [0] * len(ids), dict(zip(plain, plain_ends, strict=True))
    last = 0
    for i in range(len(ids)):
        last = reached.get(i, last)
        ends[i] = last
    if last != len(text):
        raise ModelError(
            f"tokenizer {type(tokenizer).__name__}: {len(ids)} tokens end at character {last} of {len(text)}, so segments cannot be laid over them; use another tokenizer"
        )
    return text, ends


def _bytes_of_alphabet() -> dict[str, int]:
    """The byte-level alphabet of GPT-2: printable bytes stand for themselves, the others for U+0100 and on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + i): byte for i, byte in enumerate(hidden)}}


_ALPHABET = _bytes_of_alphabet()


def _ends_by_bytes(tokenizer: Any, ids: Sequence[int], text: str) -> list[int] | None:
    """Ends for byte-level BPE, where tokens are bytes and the text is those bytes read as UTF-8; else None."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    ends, pieces, length = [], [], 0
    for i, token in enumerate(tokenizer.convert_ids_to_tokens(list(ids))):
        piece = decoder.decode(_token_bytes(token or ""), final=i == len(ids) - 1)
        pieces.append(piece)
        length += len(piece)
        ends.append(length)
    # Another kind of tokenizer, or one with a normalising decoder, gives another text: then this is no answer.
    return ends if "".join(pieces) == text else None


def _token_bytes(token: str) -> bytes:
    if all(char in _ALPHABET for char in token):
        return bytes(_ALPHABET[char] for char in token)
    return token.encode("utf-8", "surrogatepass")  # an added token, stored as it reads


def _ends_by_windows(decode: Callable[[Sequence[int]], str], ids: Sequence[int], text: str) -> list[int] | None:
    """Ends from decoding a few tokens at a time, each step checked against the text; None where that fails.

    `ids[start:settled]` is context whose text is known, so that a decoder which treats the first token apart
    (SentencePiece strips its space) sees no first token.
    """
    ends: list[int] = []
    start = settled = settled_end = 0
    for stop in range(1, len(ids) + 1):
        context, extended = decode(ids[start:settled]), decode(ids[start:stop])
        new = extended[len(context) :] if extended.startswith(context) else ""
        common = _common_prefix(new, text[settled_end : settled_end + len(new)])
        ends.append(max(ends[-1] if ends else 0, settled_end + common))
        if new and common == len(new) and not new.endswith("\ufffd"):
            start, settled, settled_end = settled, stop, settled_end + common
    return ends if not ids or ends[-1] == len(text) else None


def _ends_by_prefixes(decode: Callable[[Sequence[int]], str], ids: Sequence[int], text: str) -> list[int]:
    """Ends by their definition, O(T^2): how far the text of each prefix of the tokens agrees with the text."""
    ends: list[int] = []
    for stop in range(1, len(ids) + 1):
        ends.append(max(ends[-1] if ends else 0, _common_prefix(decode(ids[:stop]), text)))
    return ends


def _common_prefix(a: str, b: str) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def segment_of_tokens(ends: Sequence[int], cuts: Sequence[int]) -> list[int]:
    """Which segment each token belongs to: the one that its first character lies in.

    A token without text of its own belongs to the segment of the character it is part of, or of the text
    that follows it; at the end of the response (the end-of-turn token) to the last segment.

    Args:
        ends: (T,) from `token_char_ends`.
        cuts: (K,) cuts *without* a leading 0; (0,) alone is the empty response, whose tokens all get 0.

    Returns:
        (T,) segment indexes in 0..K-1, non-decreasing.

    Raises:
        ValueError: no cuts, or a leading 0 before others.
    """
    if not cuts or (cuts[0] <= 0 and len(cuts) > 1):
        raise ValueError(
            f"segments are counted over cuts without the leading 0; got {tuple(cuts[:3])}...: remove the 0 first"
        )
    starts = [0, *ends[:-1]] if ends else []
    return [min(bisect.bisect_right(cuts, start), len(cuts) - 1) for start in starts]
