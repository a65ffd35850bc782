"""The answer inside an answer: the label that was chosen, the number that was reached.

What cannot be told without doubt is None: a completion that names every label has chosen none.
"""

import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction

from ballast.rewards.matching import MAX_CHARACTERS

_MAX_DIGITS = 100
_MAX_EXPONENT = 400  # above it a float has no number either, and an exact one takes memory without end

# Quantifiers with a second + are possessive: they never give back, so that no text takes longer than its length.
_DECIMAL = r"(?:\d{1,3}(?:,\d{3})++(?!\d)|\d++)(?:\.\d++)?|(?<!\.)\.\d++"
_POWER = r"(?:[eE][-+]?\d++|\s?[x×*]\s?10\s?\^\s?\{?[-+]?\d++\}?)"
_NUMBER = re.compile(
    rf"""
    (?P<sign>(?<![\w)\]}}%])[-+])?(?:[$€£¥]\s?)?      # a minus after a number or a bracket is a subtraction
    (?<![^\W_])(?<!\d\.)                               # no part of a word, nor of 3.14.15
    (?:(?:(?P<mixed>\d++)\ )?(?<!/)(?P<top>{_DECIMAL})\s?/\s?(?P<bottom>{_DECIMAL})(?!\s?/|\.?\d)   # no 12/25/2026
    | (?P<decimal>{_DECIMAL})(?P<power>{_POWER})?)
    (?P<percent>\s?(?:%|percent\b))?
    """,
    re.VERBOSE,
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s?\{([^{}\\]{1,50})\}\s?\{([^{}\\]{1,50})\}")
_GROUPING = re.compile("(?<=\\d)[\u00a0\u2009\u202f](?=\\d{3}(?!\\d))")
_VULGAR = re.compile("(?<=\\d)(?=[\u00bc-\u00be\u2150-\u215e\u2189])")


def last_number(text: str) -> Fraction | None:
    """The last number in a text, exactly; None where there is none.

    Reads signs (`-` and the true minus), thousands separators (comma, or a no-break or thin space), decimals, powers
    of ten (`1e-3`, `6.02 x 10^23`), fractions (`-3/4`, `2 1/2`, `\\frac{3}{4}`, vulgar ones), currency signs, and
    percent (50% is 1/2). A comma is never a decimal point. Digits inside a word (`H2O`) are no number.

    Args:
        text: at most its last 20,000 characters are read.

    Returns:
        None too where the last number cannot be a value: division by zero, more than 100 digits, an exponent above 400.
    """
    found = list(_NUMBER.finditer(_plain(text[-MAX_CHARACTERS:])))
    return _value(found[-1]) if found else None


def _plain(text: str) -> str:
    """Compatibility forms as plain digits, signs and separators."""
    text = _GROUPING.sub(",", _VULGAR.sub(" ", text))
    text = unicodedata.normalize("NFKC", text).translate({0x2212: "-", 0x2044: "/"})
    text = text.replace("\\times", "×").replace("\\%", "%").replace("\\$", "$").replace("{,}", ",")
    return _LATEX_FRACTION.sub(r"\1/\2", text)


def _value(match: re.Match[str]) -> Fraction | None:
    if sum(c.isdigit() for c in match[0]) > _MAX_DIGITS:
        return None
    try:
        if match["decimal"]:
            value = _decimal(match["decimal"])
        else:
            value = int(match["mixed"] or 0) + _decimal(match["top"]) / _decimal(match["bottom"])
    except ZeroDivisionError:
        return None
    if match["power"]:
        exponent = int(re.findall(r"[-+]?\d+", match["power"])[-1])
        if abs(exponent) > _MAX_EXPONENT:
            return None
        value *= Fraction(10) ** exponent
    if match["percent"]:
        value /= 100
    return -value if match["sign"] == "-" else value


def _decimal(digits: str) -> Fraction:
    return Fraction(digits.replace(",", ""))


def chosen_label(text: str, labels: Sequence[str]) -> str | None:
    """The label that a completion chooses, or None where it chooses none, or more than one.

    In this order, the first that finds any decides:

    1. the last `\\boxed{B}`;
    2. the last statement: "the answer is (B)", "Answer: B", "the correct option is B";
    3. the last line, if it is a label and nothing else;
    4. the opening: "B) Paris", "B.", "(B), because";
    5. the only label there is: in brackets, or else as a word of its own.

    "The answer is A or B" states nothing. Single letters are read as capitals; a small one counts where it is set
    off, as in "(b)" or "b)".

    Args:
        text: at most its last 20,000 characters are read.
        labels: letters, or words such as `yes` and `no`; letters and digits only.

    Returns:
        One of `labels`, as it is written there.
    """
    cut, text = len(text) > MAX_CHARACTERS, text[-MAX_CHARACTERS:]
    text = re.sub(r"[*`_]+", "", unicodedata.normalize("NFKC", text)).strip()
    known = {label.casefold(): label for label in labels}
    one = "|".join(sorted(map(re.escape, known), key=len, reverse=True))
    capitals = "|".join(sorted(map(re.escape, labels), key=len, reverse=True))
    single = all(len(label) == 1 for label in labels)
    # A small "a" is an article unless something sets it off.
    bare = rf"(?:{capitals})\b|(?i:{one})(?=\s*(?:[)\].,;:}}]|$))" if single else rf"(?i:{one})\b"
    hedge = rf"(?!\s*[)\]]?\s*(?:or|and|/|,|&)\s*[(\[]?(?i:{one})\b)"
    stated = rf"(?i:answer|(?:correct|right|best)\s(?:one|option|choice|statement))\b(?i:\s(?:is|would\sbe|must\sbe|should\sbe|option|choice|letter))*\s?[:=]?\s?[(\[{{\"']*(?P<label>{bare}){hedge}"
    line = text.splitlines()[-1].strip() if text else ""
    opening = rf"[(\[\"']*(?P<label>(?i:{one})){hedge}(?:[)\].:,](?!\w)|\s*$|\s*\n|\s+[-–—])"
    tries = [
        re.findall(rf"\\boxed\s?\{{\s*(?:\\text\s?\{{)?\(?((?i:{one}))\)?\s*\}}", text),
        [m["label"] for m in re.finditer(stated, text)],
        re.findall(rf"\A[(\[\"']*((?i:{one}))[)\]\"'.]*\Z", line),
        [m["label"] for m in [re.match(opening, text)] if m and not cut],
    ]
    for found in tries:
        if found:
            return known[found[-1].casefold()]
    # "A dog" and "I think" are words and no labels.
    article = r"(?<![AI]\b(?=\s+(?!or\b|and\b)[a-z]))" if single else ""
    alone = rf"\b((?:{capitals}))\b{article}" if single else rf"\b((?i:{one}))\b"
    for pattern in (rf"[(\[]((?i:{one}))[)\]]", alone):
        distinct = {word.casefold() for word in re.findall(pattern, text)}
        if distinct:
            return known[distinct.pop()] if len(distinct) == 1 else None
    return None
