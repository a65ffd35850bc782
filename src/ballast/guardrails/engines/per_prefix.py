"""The reference engine: a causal verdict guard is run over every prefix from its first token to its last.

Slow and plain on purpose: every faster engine must agree with it. One forward a distinct prompt, no
decoding; the verdict is read from the raw logits after the last token:

    risk = sum p(unsafe ids) / sum p(all label ids)        (in log space: a sigmoid of two logsumexps)

Shape letters: R rows (rendered prompts) of a batch, L tokens of the longest, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ballast.guardrails.engines.interface import Group, Labels, Verdict

if TYPE_CHECKING:
    import torch


class PerPrefixEngine:
    """Runs rendered prompts through a causal model in left-padded batches.

    Args:
        model: a causal language model (transformers) in evaluation mode.
        labels: token ids that begin a verdict.
        batch_size: prompts a forward.
        context: tokens that the model can read; a longer prompt is unscored, never shortened.
    """

    name = "per_prefix"

    def __init__(self, model: Any, labels: Labels, batch_size: int, context: int) -> None:
        self.model, self.labels, self.context = model, labels, context
        self._batch_size = batch_size

    def score(self, groups: Sequence[Group]) -> list[list[Verdict]]:
        """Read the verdict after each prompt; see `VerdictEngine.score`. Groups mean nothing here."""
        distinct = dict.fromkeys(tuple(row) for group in groups for row in group)
        verdicts: dict[tuple[int, ...], Verdict] = {
            row: Verdict.too_long(len(row), self.context) for row in distinct if len(row) > self.context
        }
        for batch in self._batches(row for row in distinct if row not in verdicts):
            verdicts.update(zip(batch, self._forward(batch), strict=True))
        return [[verdicts[tuple(row)] for row in group] for group in groups]

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
        return read_verdicts(self.logits(rows).float(), self.labels)

    def logits(self, rows: Sequence[tuple[int, ...]]) -> "torch.Tensor":
        """The next token's logits (R, V) after prompts that fit the context, in one forward."""
        import torch

        longest = max(len(row) for row in rows)
        # Padding stands to the left, so that every row ends in the last column; id 0 there is masked out.
        ids_RL = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
        mask_RL = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        position_RL = (mask_RL.cumsum(dim=1) - 1).clamp(min=0)
        device = self.model.device
        with torch.inference_mode():
            logits_RLV: torch.Tensor = self.model(
                input_ids=ids_RL.to(device),
                attention_mask=mask_RL.to(device),
                position_ids=position_RL.to(device),
                use_cache=False,
                logits_to_keep=1,
            ).logits
        return logits_RLV[:, -1]


def read_verdicts(logits_RV: "torch.Tensor", labels: Labels) -> list[Verdict]:
    """(R,) verdicts from the next token's raw logits (R, V), in float32."""
    import torch

    safe_R = logits_RV[:, list(labels.safe)].logsumexp(dim=-1)
    unsafe_R = logits_RV[:, list(labels.unsafe)].logsumexp(dim=-1)
    risk_R = torch.sigmoid(unsafe_R - safe_R)
    mass_R = (torch.logaddexp(safe_R, unsafe_R) - logits_RV.logsumexp(dim=-1)).exp()
    read = torch.stack([risk_R, mass_R], dim=1).tolist()  # the one place where the host waits
    return [Verdict.of(risk, mass) for risk, mass in read]
