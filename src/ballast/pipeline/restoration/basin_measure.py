"""What a model does with harmful requests, read three ways at once."""

from collections.abc import Sequence
from typing import Any

from ballast.guardrails.types import Guardrail
from ballast.pipeline.config_inputs import SamplingConfig
from ballast.pipeline.data import Row
from ballast.pipeline.evaluation.judges import Completion, judge_completions
from ballast.pipeline.generation import TransformersGenerator
from ballast.pipeline.restoration.basin import Reading


class BasinMeasure:
    """Lets a model answer requests, greedily, and judges the answers.

    Args:
        rows: the requests.
        prompt_ids: the same as token ids, up to where the assistant begins to write.
        tokenizer: the model's.
        judge: the guardrail that measures.
        max_new_tokens: of an answer.
        batch_size: answers at a time.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        prompt_ids: Sequence[Sequence[int]],
        tokenizer: Any,
        judge: Guardrail,
        max_new_tokens: int = 32,
        batch_size: int = 16,
    ) -> None:
        self.rows, self.prompt_ids, self.tokenizer, self.judge = rows, prompt_ids, tokenizer, judge
        self.sampling = SamplingConfig(max_new_tokens=max_new_tokens, temperature=0.0)
        self.batch_size = batch_size

    def __call__(self, model: Any) -> Reading:
        """Shares over all requests; of `unsafe` over those that the judge scored.

        Raises:
            GuardError: the judge broke its contract.
        """
        training = model.training
        model.eval()
        try:
            answers = TransformersGenerator(model, self.tokenizer, self.batch_size).generate(
                self.prompt_ids, self.sampling, seed=0
            )
        finally:
            model.train(training)
        completions = [
            Completion(row.id, row.prompt, row.kind, answer.text, answer.truncated)
            for row, answer in zip(self.rows, answers, strict=True)
        ]
        verdicts = judge_completions(completions, self.judge)
        scored = [verdict.unsafe for verdict in verdicts if verdict.unsafe is not None]
        return Reading(
            complied=sum(not verdict.refused for verdict in verdicts) / len(verdicts),
            unsafe=sum(scored) / len(scored) if scored else None,
            coherent=sum(verdict.coherent for verdict in verdicts) / len(verdicts),
        )
