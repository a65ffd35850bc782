"""A verdict from the log-probs of some of the vocabulary, as vLLM and its like report them."""

import math
from collections.abc import Iterable, Mapping

from ballast.guardrails.engines.interface import Labels, Verdict

_ROUNDING = 1e-2  # log-probs of 16-bit logits may exceed what they stand for by so much


def verdict_from_logprobs(found: Mapping[int, float], labels: Labels) -> Verdict:
    """A verdict from the next token's log-probs.

    `found` holds the labels themselves, or the most likely tokens, whatever they are. In the second case a label
    that is missing is not impossible, only less likely than the least likely token there: p <= exp(min(found)).
    Within that bound the riskier end is taken, so that what is not known can raise the risk and never lower it:

        missing unsafe label: p = exp(min(found)), each
        missing safe label:   p = 0

    Args:
        found: token id -> log-prob; together at most a probability of 1.
        labels: the ids to read.

    Returns:
        The verdict. `label_mass` counts what was reported, not what was assumed. Unscored where no label is in
        `found`, and where `found` cannot be log-probs (not finite, above 0, more than 1 in all).
    """
    if any(math.isnan(value) or value > _ROUNDING for value in found.values()) or _sum(found.values()) > 1 + _ROUNDING:
        return Verdict(None, reason="its numbers are no log-probs: above 0, above 1 in all, or not a number")
    safe = [found[token] for token in labels.safe if token in found]
    unsafe = [found[token] for token in labels.unsafe if token in found]
    if not safe and not unsafe:
        return Verdict(
            None, reason="no label of the guard is among the most likely tokens; its template likely does not fit"
        )
    mass = _sum([*safe, *unsafe])
    least = min(found.values())
    p_safe, p_unsafe = _sum(safe), _sum([*unsafe, *[least] * (len(labels.unsafe) - len(unsafe))])
    if p_safe + p_unsafe == 0.0:
        return Verdict(
            None, reason="the guard gives its labels no probability at all; its template likely does not fit"
        )
    return Verdict.of(p_unsafe / (p_safe + p_unsafe), mass)


def _sum(logprobs: Iterable[float]) -> float:
    return math.fsum(math.exp(value) for value in logprobs)
