"""Whose outputs may train another model: the licences of known guards, and what they say of a reward.

A guard that rewards improves the policy by its outputs, which some licences forbid and others tie to a
condition. The table holds what the model cards and licences said when it was written; it is a reminder, and no
legal advice.

A model is known by the last part of its name (`owner/Llama-Guard-3-8B`, a folder of that name), so that
mirrors and quantised copies are recognised as well. A renamed model is `unknown`, never allowed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

AsReward = Literal["yes", "no", "conditions", "unknown"]


@dataclass(frozen=True)
class Licence:
    """A licence as far as it concerns a guardrail.

    Attributes:
        name: what it is called; an SPDX identifier where there is one.
        as_reward: whether the guard's outputs may train another model. `conditions`: only as `note` says.
        note: the condition, the prohibition, or where to look; empty where there is nothing to add.
    """

    name: str
    as_reward: AsReward
    note: str = ""


APACHE = Licence("Apache-2.0", "yes")
_LLAMA_OLD = "its terms forbid using outputs to improve any model that is no Llama {}"
_LLAMA_NEW = "the name of the trained model must begin with 'Llama', and 'Built with Llama' must be shown"
_LLAMA_2 = Licence("Llama 2 Community", "no", _LLAMA_OLD.format(2))
_LLAMA_3 = Licence("Llama 3 Community", "no", _LLAMA_OLD.format(3))
_LLAMA_3_1 = Licence("Llama 3.1 Community", "conditions", _LLAMA_NEW)
_LLAMA_3_2 = Licence("Llama 3.2 Community", "conditions", _LLAMA_NEW)
_LLAMA_4 = Licence("Llama 4 Community", "conditions", _LLAMA_NEW)
_GEMMA = Licence(
    "Gemma Terms of Use", "conditions", "a model trained on its outputs may count as derived and carry its use limits"
)
_NON_COMMERCIAL = Licence("non-commercial", "conditions", "research only: neither it nor what it trained may be sold")
_GATED = Licence("Apache-2.0", "yes", "gated: its owner's use guidelines are accepted before the download")
UNKNOWN = Licence("unknown", "unknown", "not in Ballast's table: read the model card before it rewards")

# Beginnings of model names, lower case, without the owner. The longest that fits decides.
MODELS: dict[str, Licence] = {
    "llamaguard-7b": _LLAMA_2,
    "llama-guard-2": _LLAMA_3,
    "meta-llama-guard-2": _LLAMA_3,
    "llama-guard-3-8b": _LLAMA_3_1,
    "llama-guard-3-1b": _LLAMA_3_2,
    "llama-guard-3-11b": _LLAMA_3_2,
    "llama-guard-4": _LLAMA_4,
    "llama-3.1-nemoguard": _LLAMA_3_1,
    "aegis-ai-content-safety-llamaguard": _LLAMA_2,
    "harmbench-llama-2": _LLAMA_2,
    "beaver-dam": _NON_COMMERCIAL,
    "bingoguard": _NON_COMMERCIAL,
    "shieldgemma": _GEMMA,
    "qwen3guard": APACHE,
    "granite-guardian": APACHE,
    "wildguard": _GATED,
    "harmaug-guard": APACHE,
    "duoguard-0.5b": APACHE,
    "duoguard-1.5b": APACHE,
    "duoguard-1b-llama-3.2": _LLAMA_3_2,
    "toxic-bert": APACHE,
    "embedded:smollm2": APACHE,
    "smollm2": APACHE,
}

# Guards that carry their own weights or none; the others are what their model is.
FAMILIES: dict[str, Licence] = {
    "embedded": APACHE,
    "ngram": APACHE,
    "rules": APACHE,
    "moderation": Licence("terms of the service", "unknown", "read whether its answers may train another model"),
}

# The worst comes first: a guard made of several is as free as the least free of them.
_SEVERITY: tuple[AsReward, ...] = ("no", "unknown", "conditions", "yes")


def licence_of_model(model: str) -> Licence:
    """The licence of a model by its name: hub id, folder, or `embedded:...`; `unknown` where no name fits."""
    lowered = model.lower().rstrip("/")
    name = lowered if lowered.startswith("embedded:") else lowered.rsplit("/", 1)[-1]
    fitting = [beginning for beginning in MODELS if name.startswith(beginning)]
    return MODELS[max(fitting, key=len)] if fitting else UNKNOWN


def strictest(licences: Iterable[Licence]) -> Licence:
    """The licence that allows least; `unknown` of none."""
    return min(licences, key=lambda licence: _SEVERITY.index(licence.as_reward), default=UNKNOWN)
