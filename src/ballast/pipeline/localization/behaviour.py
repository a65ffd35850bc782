"""What layers do to refusals: leave one out (ablation), or make several louder (over-refusal scaling).

L layers   N prompts
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ballast.pipeline.config_inputs import SamplingConfig
from ballast.pipeline.generation import TransformersGenerator
from ballast.pipeline.localization.bands import Band, Choice, Curve
from ballast.pipeline.localization.gap import left_padded
from ballast.rewards.refusal import refusal_score


class Refusals:
    """Asks a model and tells by keywords how much of a refusal each answer is.

    Args:
        model: a causal model.
        tokenizer: its tokenizer.
        max_new_tokens: of an answer.
        batch_size: prompts at a time.
    """

    def __init__(self, model: Any, tokenizer: Any, max_new_tokens: int, batch_size: int) -> None:
        self.model = model
        self.generator = TransformersGenerator(model, tokenizer, batch_size)
        self.sampling = SamplingConfig(max_new_tokens=max_new_tokens, temperature=0.0)

    def scores(self, prompt_ids: Sequence[Sequence[int]]) -> np.ndarray:
        """(N,) refusal of each greedy answer, in [0, 1]."""
        return np.array([refusal_score(text) for text in (a.text for a in self._answers(prompt_ids))])

    def answers(self, prompt_ids: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """(N,) token ids of the greedy answers."""
        return [answer.ids for answer in self._answers(prompt_ids)]

    def _answers(self, prompt_ids: Sequence[Sequence[int]]) -> list[Any]:
        was_training = self.model.training
        self.model.eval()
        try:
            return self.generator.generate(prompt_ids, self.sampling, seed=0)
        finally:
            self.model.train(was_training)


def answer_loss(
    model: Any, prompt_ids: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], batch_size: int
) -> float:
    """Mean over tokens of -log p(answer | prompt), in nats."""
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(answers), batch_size):
            part = slice(start, start + batch_size)
            some = [list(answer) for answer in answers[part]]
            rows = [[*prompt, *answer] for prompt, answer in zip(prompt_ids[part], some, strict=True)]
            inputs = left_padded(model, rows, 0)
            longest = max(len(answer) for answer in some)
            logits = model(**inputs, use_cache=False, logits_to_keep=longest + 1).logits[:, :-1]
            targets = inputs["input_ids"][:, -longest:]
            scores = torch.log_softmax(logits.float(), -1).gather(2, targets[..., None])[..., 0]
            for row, answer in zip(scores, some, strict=True):
                total -= float(row[longest - len(answer) :].double().sum())
                count += len(answer)
    return total / max(1, count)


def ablation_curve(
    refusals: Refusals,
    harmful_ids: Sequence[Sequence[int]],
    ordinary_ids: Sequence[Sequence[int]],
    max_language_loss: float,
    replicates: int = 200,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Curve:
    """By how much refusals of harmful prompts fall without each layer, paired, with a 95% band over prompts.

    A layer without which the model's own answers to ordinary prompts become less likely by more than
    `max_language_loss` nats a token is not scored (None): broken text does not refuse, whatever the layer did.
    """
    from ballast.pipeline.training.layers import decoder_layers, skipped

    model, size = refusals.model, refusals.generator.batch_size
    whole = refusals.scores(harmful_ids)
    own = refusals.answers(ordinary_ids)
    fluent = answer_loss(model, ordinary_ids, own, size)
    generator = np.random.default_rng(seed)
    draws = generator.integers(0, len(whole), (replicates, len(whole)))
    value: list[float | None] = []
    low: list[float | None] = []
    high: list[float | None] = []
    for layer in range(len(decoder_layers(model))):
        with skipped(model, [layer]):
            if answer_loss(model, ordinary_ids, own, size) - fluent > max_language_loss:
                found: tuple[float | None, ...] = (None, None, None)
            else:
                drop = whole - refusals.scores(harmful_ids)
                band = np.quantile(drop[draws].mean(axis=1), (0.025, 0.975))
                found = (float(drop.mean()), float(band[0]), float(band[1]))
        for column, one in zip((value, low, high), found, strict=True):
            column.append(one)
        if progress is not None:
            progress(1)
    return Curve(tuple(value), tuple(low), tuple(high))


def scaled_band(
    refusals: Refusals,
    scary_ids: Sequence[Sequence[int]],
    start: Band,
    alpha: float,
    reach: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[Choice, dict[Band, float]]:
    """The borders at which layers made louder by `alpha` refuse most of the scary but harmless prompts.

    The last layer is moved first, then the first one, each by up to `reach` layers; of equal ones the nearest to where
    it was is taken (arXiv 2408.17003, section 3.3).

    Returns:
        The band, or None where no band refuses more than the model as it is; and every band tried, with its mean
        refusal.
    """
    from ballast.pipeline.training.layers import decoder_layers, scaled

    count = len(decoder_layers(refusals.model))
    plain = float(refusals.scores(scary_ids).mean())
    tried: dict[Band, float] = {}

    def refused(band: Band) -> float:
        if band not in tried:
            with scaled(refusals.model, range(band[0], band[1] + 1), alpha):
                tried[band] = float(refusals.scores(scary_ids).mean())
            if progress is not None:
                progress(1)
        return tried[band]

    first, last = start
    ends = [n for n in range(last - reach, last + reach + 1) if first <= n < count]
    last = min(ends, key=lambda n: (-refused((first, n)), abs(n - start[1])))
    begins = [n for n in range(first - reach, first + reach + 1) if 0 <= n <= last]
    first = min(begins, key=lambda n: (-refused((n, last)), abs(n - start[0])))
    if tried[first, last] <= plain:
        reason = f"no scaled band refuses more scary prompts than the model as it is ({plain:.2f})"
        return Choice(None, reason), tried
    reason = f"scaled by {alpha} it refuses {tried[first, last]:.2f} of scary prompts, unscaled {plain:.2f}"
    return Choice((first, last), reason), tried
