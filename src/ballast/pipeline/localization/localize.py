"""Which layers of a model are its safety layers: three ways to ask, and an answer that may be "none"."""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ballast.errors import DataError
from ballast.pipeline.config_safety_layers import LocalizeConfig, preset_layers
from ballast.pipeline.localization.bands import Band, Choice, Curve, band_of_drops, band_of_gap, stable_band
from ballast.pipeline.localization.behaviour import Refusals, ablation_curve, scaled_band
from ballast.pipeline.localization.gap import gap_curve, last_token_states

Prompts = Sequence[Sequence[int]]
DEFAULT = LocalizeConfig()

# What the model was asked with, of each seed: a share below 1 so that the draws differ where all prompts are wanted.
_DRAWN = 0.8


@dataclass(frozen=True)
class Localization:
    """What was found.

    Attributes:
        method: gap, ablation or scaling.
        layers: first and last safety layer, counted from 0; None where none can be named.
        reason: how they were chosen, or why there are none.
        seeds: what each seed found: `layers`, `reason`, and `prompts`, the number of each kind.
        curves: one a seed, a score a layer; of `scaling` those of the gap that it started from.
        tried: of `scaling`, one a seed: `first-last` to the mean refusal of scary prompts.
    """

    method: str
    layers: Band | None
    reason: str
    seeds: tuple[dict[str, Any], ...]
    curves: tuple[Curve, ...]
    tried: tuple[dict[str, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As the stage writes it down."""
        return asdict(self)


def localize_safety_layers(
    model: Any,
    tokenizer: Any,
    harmful_ids: Prompts,
    ordinary_ids: Prompts,
    scary_ids: Prompts = (),
    settings: LocalizeConfig = DEFAULT,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Localization:
    """Find the layers that tell harmful requests from harmless ones.

    `gap` and `scaling` compare harmful with harmless prompts, ordinary and scary ones together, matched in length.

    Args:
        model: a causal model of transformers; it is as before afterwards.
        tokenizer: its tokenizer.
        harmful_ids: token ids of harmful requests, up to where the assistant begins to write.
        ordinary_ids: of everyday requests.
        scary_ids: of requests that sound harmful and are not; needed by `scaling`.
        settings: method and sizes.
        seed: the first of `settings.seeds` seeds, one after the other.
        progress: called with 1 after each seed.

    Raises:
        DataError: too few prompts of a kind.
        ModelError: the layers cannot be found.
    """
    needed = {"harmful": harmful_ids, "ordinary": ordinary_ids} | (
        {"scary": scary_ids} if settings.method == "scaling" else {}
    )
    for kind, ids in needed.items():
        if len(ids) < 4:
            raise DataError(
                f"{len(ids)} {kind} prompts are too few to find safety layers by the method {settings.method}; give at least 4, "
                "better 100, by localize.data"
            )
    asked = _Asked(model, tokenizer, settings, harmful_ids, ordinary_ids, scary_ids)
    choices, curves, tried, records = [], [], [], []
    for one in range(seed, seed + settings.seeds):
        choice, curve, bands, counts = asked.by_seed(one)
        choices.append(choice)
        curves.append(curve)
        tried.append({f"{first}-{last}": refused for (first, last), refused in bands.items()})
        records.append({"seed": one, "layers": choice.band, "reason": choice.reason, "prompts": counts})
        if progress is not None:
            progress(1)
    chosen = stable_band(choices, settings.tolerance)
    return Localization(
        settings.method, chosen.band, chosen.reason, tuple(records), tuple(curves), tuple(t for t in tried if t)
    )


class _Asked:
    """One model and its prompts, asked by several seeds."""

    def __init__(
        self, model: Any, tokenizer: Any, settings: LocalizeConfig, harmful: Prompts, ordinary: Prompts, scary: Prompts
    ) -> None:
        self.model, self.settings = model, settings
        self.pad = tokenizer.pad_token_id or 0
        self.prompts = {"harmful": harmful, "ordinary": ordinary, "scary": scary}
        self.refusals = Refusals(model, tokenizer, settings.max_new_tokens, settings.batch_size)

    def by_seed(self, seed: int) -> tuple[Choice, Curve, dict[Band, float], dict[str, int]]:
        """What one draw of prompts says: choice, curve, bands tried, prompts used."""
        generator = random.Random(seed)
        harmful = self._draw(self.prompts["harmful"], generator)
        if self.settings.method == "ablation":
            ordinary = self._draw(self.prompts["ordinary"], generator)
            curve = ablation_curve(
                self.refusals, harmful, ordinary, self.settings.max_language_loss, self.settings.replicates, seed
            )
            return band_of_drops(curve), curve, {}, {"harmful": len(harmful), "ordinary": len(ordinary)}
        harmless = matched([*self.prompts["ordinary"], *self.prompts["scary"]], harmful, generator)
        states = [last_token_states(self.model, ids, self.settings.batch_size, self.pad) for ids in (harmless, harmful)]
        curve = gap_curve(states[0], states[1], self.settings.pairs, self.settings.replicates, seed)
        counts = {"harmful": len(harmful), "harmless": len(harmless)}
        if self.settings.method == "gap":
            return band_of_gap(curve), curve, {}, counts
        scary = self._draw(self.prompts["scary"], generator)
        start = band_of_gap(curve).band or preset_layers("", len(curve.value))[0]
        choice, tried = scaled_band(self.refusals, scary, start, self.settings.alpha, self.settings.reach)
        return choice, curve, tried, counts | {"scary": len(scary)}

    def _draw(self, prompts: Prompts, generator: random.Random) -> list[Sequence[int]]:
        return generator.sample(list(prompts), min(self.settings.prompts, max(4, int(_DRAWN * len(prompts)))))


def matched(pool: Prompts, like: Prompts, generator: random.Random) -> list[Sequence[int]]:
    """For each prompt of `like` one of the pool that is nearest in length and not taken yet; ties by chance.

    As many as there are of both.
    """
    left = list(pool)
    generator.shuffle(left)
    chosen = []
    for prompt in like:
        if not left:
            break
        nearest = min(range(len(left)), key=lambda n: abs(len(left[n]) - len(prompt)))
        chosen.append(left.pop(nearest))
    return chosen
