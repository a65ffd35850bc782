"""vLLM in this process as a guard's engine: prefix caching shares what the prompts of an exchange have in common.

One token a prompt, at temperature 0, with the raw log-probs of the label ids.
"""

import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ballast.guardrails.engines.interface import Group, Labels, Verdict
from ballast.guardrails.engines.logprobs import verdict_from_logprobs
from ballast.models import resolve_model
from ballast.vllm_environment import next_token_logprobs, start_vllm

if TYPE_CHECKING:
    from ballast.guardrails.engines.options import VLLMEngineOptions

# Prefixes are shared in whole blocks. On a CPU vLLM's own choice is 128 tokens, most of which the cuts of a
# response would not share; 32 is the least that its kernels take.
_CPU_BLOCK = 32


class VLLMVerdictEngine:
    """A vLLM engine of its own for one guard; it starts here, in seconds.

    Args:
        model: `embedded:smollm2-135m`, a local folder or a hub id.
        options: context and memory.
        labels: token ids that begin a verdict.
        dtype: `bfloat16`, `float16` or `float32`.
        revision: commit or tag of a hub id; None takes its default branch.

    Raises:
        EngineError: vLLM is not installed or did not start.
        ModelError: the model cannot be found.
    """

    name = "vllm"

    def __init__(
        self, model: str, options: "VLLMEngineOptions", labels: Labels, dtype: str, revision: str | None
    ) -> None:
        self._labels = labels
        longest = "its model's own" if options.max_model_len is None else options.max_model_len
        self._llm: Any = start_vllm(
            model=resolve_model(model, revision),
            cpu_kv_cache_gib=options.cpu_kv_cache_gib,
            smaller=f"Lower max_model_len (now {longest}) or gpu_memory_utilization of the guard's engine",
            instead="set the guard's engine to auto",
            dtype=dtype,
            max_model_len=options.max_model_len,
            gpu_memory_utilization=options.gpu_memory_utilization,
            enforce_eager=options.enforce_eager,
            logprobs_mode="raw_logprobs",
            enable_prefix_caching=True,
            skip_tokenizer_init=True,
            **_blocks(),
        )
        # vLLM keeps room for the token that it samples.
        self._context = self._llm.llm_engine.model_config.max_model_len - 1

    def score(self, groups: Sequence[Group]) -> list[list[Verdict]]:
        """Read the verdict after each prompt; see `VerdictEngine.score`.

        Raises:
            EngineError: vLLM itself failed, after which it may answer nothing more.
        """
        # The longest prompt of a group comes first: the others then find in the cache what they share with it.
        ordered = [row for group in groups for row in sorted((tuple(row) for row in group), key=len, reverse=True)]
        verdicts = {row: Verdict.too_long(len(row), self._context) for row in ordered if len(row) > self._context}
        rows = [row for row in dict.fromkeys(ordered) if row not in verdicts]
        if rows:
            found = next_token_logprobs(self._llm, rows, [*self._labels.safe, *self._labels.unsafe])
            verdicts.update({row: verdict_from_logprobs(f, self._labels) for row, f in zip(rows, found, strict=True)})
        return [[verdicts[tuple(row)] for row in group] for group in groups]

    def close(self) -> None:
        """Free the engine's memory. Safe to call twice; nothing can be scored afterwards."""
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()


def _blocks() -> dict[str, int]:
    import torch

    return {} if torch.cuda.is_available() else {"block_size": _CPU_BLOCK}
