"""The reference engine: a causal verdict guard is run over every prefix from its first token to its last.

Slow and plain on purpose: every faster engine must agree with it. One forward a distinct prompt, no
decoding; the verdict is read from the raw logits after the last token:

    risk = sum p(unsafe ids) / sum p(all label ids)        (in log space: a sigmoid of two logsumexps)

Shape letters: R rows (rendered prompts) of a batch, L tokens of the longest, V vocabulary.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Verdict:
    """What a guard says after one rendered prompt.

    Attributes:
        risk: P(unsafe) in [0, 1] among the labels; None if unscored.
        label_mass: share in [0, 1] of the next token's probability that lies on any label; None if unscored.
        reason: why it is unscored.
    """

    risk: float | None
    label_mass: float | None = None
    reason: str | None = None


class PerPrefixEngine:
    """Runs rendered prompts through a causal model in left-padded batches.

    Args:
        model: a causal language model (transformers) in evaluation mode.
        safe_ids: token ids that begin a safe verdict.
        unsafe_ids: token ids that begin an unsafe verdict; disjoint from `safe_ids`.
        batch_size: prompts a forward.
        context: tokens that the model can read; a longer prompt is unscored, never shortened.
    """

    def __init__(
        self, model: Any, safe_ids: Sequence[int], unsafe_ids: Sequence[int], batch_size: int, context: int
    ) -> None:
        self._model = model
        self._safe_ids, self._unsafe_ids = list(safe_ids), list(unsafe_ids)
        self._batch_size, self._context = batch_size, context

    def score(self, rows: Sequence[Sequence[int]]) -> list[Verdict]:
        """Read the verdict after each prompt.

        Args:
            rows: (R,) token ids that end exactly before the verdict. Equal rows are scored once.

        Returns:
            (R,) verdicts in the order given. A prompt longer than the context, or one whose logits are not
            finite, is unscored with that as the reason.
        """
        distinct = dict.fromkeys(tuple(row) for row in rows)
        verdicts: dict[tuple[int, ...], Verdict] = {
            row: Verdict(None, reason=f"the rendered prompt has {len(row)} tokens and the guard reads {self._context}")
            for row in distinct
            if len(row) > self._context
        }
        for batch in self._batches(row for row in distinct if row not in verdicts):
            verdicts.update(zip(batch, self._forward(batch), strict=True))
        return [verdicts[tuple(row)] for row in rows]

    def _batches(self, rows: Iterable[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Rows of like length together: none more than twice as long as the shortest, so half at most is padding."""
        batch: list[tuple[int, ...]] = []
        for row in sorted(rows, key=len):
            if batch and (len(batch) == self._batch_size or len(row) > 2 * len(batch[0])):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _forward(self, rows: Sequence[tuple[int, ...]]) -> list[Verdict]:
        import torch

        longest = max(len(row) for row in rows)
        # Padding stands to the left, so that every row ends in the last column; id 0 there is masked out.
        ids_RL = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
        mask_RL = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        position_RL = (mask_RL.cumsum(dim=1) - 1).clamp(min=0)
        device = self._model.device
        with torch.inference_mode():
            output = self._model(
                input_ids=ids_RL.to(device),
                attention_mask=mask_RL.to(device),
                position_ids=position_RL.to(device),
                use_cache=False,
                logits_to_keep=1,
            )
            return self._read(output.logits[:, -1].float())

    def _read(self, logits_RV: "torch.Tensor") -> list[Verdict]:
        import torch

        safe_R = logits_RV[:, self._safe_ids].logsumexp(dim=-1)
        unsafe_R = logits_RV[:, self._unsafe_ids].logsumexp(dim=-1)
        risk_R = torch.sigmoid(unsafe_R - safe_R)
        mass_R = (torch.logaddexp(safe_R, unsafe_R) - logits_RV.logsumexp(dim=-1)).exp()
        read = torch.stack([risk_R, mass_R], dim=1).tolist()  # the one place where the host waits
        return [_verdict(risk, mass) for risk, mass in read]


def _verdict(risk: float, mass: float) -> Verdict:
    if not (math.isfinite(risk) and math.isfinite(mass)):
        return Verdict(None, reason="the guard's logits are not finite")
    return Verdict(risk, label_mass=min(mass, 1.0))  # rounding can leave 1.0000001
