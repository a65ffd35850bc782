"""Generators: token ids of prompts in, completions out.

A prompt is given as ids, made once by `prompting`; nothing is tokenised twice. `VLLMGenerator` is the
default on every machine, `TransformersGenerator` serves models that vLLM lacks, and `ScriptedGenerator` is
the fake for tests.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ballast.pipeline.config_inputs import SamplingConfig
    from ballast.pipeline.vllm_engine import VLLMEngine

Progress = Callable[[int], None]

_CHUNK = 64  # completions between two reports of progress


@dataclass(frozen=True)
class Generated:
    """One sampled completion.

    Attributes:
        ids: (T,) token ids as sampled, the end-of-turn token included where the model wrote it.
        text: the ids decoded without special tokens; what a guard reads.
        truncated: the completion was cut off at the token limit.
    """

    ids: tuple[int, ...]
    text: str
    truncated: bool


class Generator(Protocol):
    """Samples completions with the weights that it holds now."""

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: "SamplingConfig",
        seed: int,
        progress: Progress | None = None,
    ) -> list[Generated]:
        """Sample one completion a prompt.

        Args:
            prompt_ids: (N,) token ids; a prompt that should be answered twice stands here twice.
            sampling: length and temperature.
            seed: row i is sampled with a seed that depends on `seed` and i alone, where the backend can.
            progress: called with the number of completions done since the last call.

        Returns:
            (N,) completions in the order of the prompts.
        """
        ...

    def log_probs(
        self,
        prompt_ids: Sequence[Sequence[int]],
        answer_ids: Sequence[Sequence[int]],
        progress: Progress | None = None,
    ) -> list[list[float]]:
        """Log-probabilities of given answers, at temperature 1.

        Args:
            prompt_ids: (N,) token ids.
            answer_ids: (N,) token ids of an answer to each, at least one.
            progress: as in `generate`.

        Returns:
            (N, T_n) natural log-probability of each token of each answer, given the prompt and the tokens before it.
        """
        ...

    def load_folder(self, folder: str) -> None:
        """Take the weights of another model folder of the same architecture."""
        ...


class VLLMGenerator:
    """Generation by a `VLLMEngine`, which training may share."""

    def __init__(self, engine: "VLLMEngine", tokenizer: Any) -> None:
        self.engine = engine
        self.tokenizer = tokenizer

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: "SamplingConfig",
        seed: int,
        progress: Progress | None = None,
    ) -> list[Generated]:
        """See `Generator.generate`."""
        generated: list[Generated] = []
        chunk = max(_CHUNK, self.engine.options.max_num_seqs)
        for start in range(0, len(prompt_ids), chunk):
            part = prompt_ids[start : start + chunk]
            outputs = self.engine.generate(
                part,
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                seeds=[_row_seed(seed, start + i) for i in range(len(part))],
            )
            for output in outputs:
                ids = tuple(output.token_ids)
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                generated.append(Generated(ids, text, truncated=output.finish_reason == "length"))
            if progress:
                progress(len(part))
        return generated

    def log_probs(
        self,
        prompt_ids: Sequence[Sequence[int]],
        answer_ids: Sequence[Sequence[int]],
        progress: Progress | None = None,
    ) -> list[list[float]]:
        """See `Generator.log_probs`."""
        found: list[list[float]] = []
        chunk = max(_CHUNK, self.engine.options.max_num_seqs)
        for start in range(0, len(prompt_ids), chunk):
            prompts, answers = prompt_ids[start : start + chunk], answer_ids[start : start + chunk]
            whole = self.engine.prompt_log_probs([[*p, *a] for p, a in zip(prompts, answers, strict=True)])
            found += [row[len(row) - len(answer) :] for row, answer in zip(whole, answers, strict=True)]
            if progress:
                progress(len(prompts))
        return found

    def load_folder(self, folder: str) -> None:
        """See `Generator.load_folder`."""
        self.engine.load_folder(folder)


class TransformersGenerator:
    """Generation by transformers, one padded batch at a time."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 16) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: "SamplingConfig",
        seed: int,
        progress: Progress | None = None,
    ) -> list[Generated]:
        """See `Generator.generate`; the seed here belongs to a batch, not to a row."""
        generated: list[Generated] = []
        for start in range(0, len(prompt_ids), self.batch_size):
            part = prompt_ids[start : start + self.batch_size]
            generated += self._batch(part, sampling, _row_seed(seed, start))
            if progress:
                progress(len(part))
        return generated

    def _batch(self, prompt_ids: Sequence[Sequence[int]], sampling: "SamplingConfig", seed: int) -> list[Generated]:
        import torch

        input_ids, mask = self._padded(prompt_ids)
        greedy = sampling.temperature == 0
        settings = (
            {"do_sample": False}
            if greedy
            else {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
        )
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(seed)
            output = self.model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                max_new_tokens=sampling.max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
                # A model folder may carry a penalty of its own; vLLM and the trainer's ratio know none.
                repetition_penalty=1.0,
                **settings,
            )
        return [self._read(row) for row in output[:, input_ids.shape[1] :].tolist()]

    def _read(self, row: list[int]) -> Generated:
        stops = self.model.generation_config.eos_token_id
        stops = {stops} if isinstance(stops, int) else set(stops or ())
        end = next((i + 1 for i, token in enumerate(row) if token in stops), None)
        ids = tuple(row[:end])
        return Generated(ids, self.tokenizer.decode(ids, skip_special_tokens=True), truncated=end is None)

    def log_probs(
        self,
        prompt_ids: Sequence[Sequence[int]],
        answer_ids: Sequence[Sequence[int]],
        progress: Progress | None = None,
    ) -> list[list[float]]:
        """See `Generator.log_probs`."""
        found: list[list[float]] = []
        for start in range(0, len(prompt_ids), self.batch_size):
            prompts = prompt_ids[start : start + self.batch_size]
            found += self._log_probs(prompts, answer_ids[start : start + self.batch_size])
            if progress:
                progress(len(prompts))
        return found

    def _log_probs(self, prompt_ids: Sequence[Sequence[int]], answer_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        import torch

        input_ids, mask = self._padded([[*p, *a] for p, a in zip(prompt_ids, answer_ids, strict=True)])
        longest = max(len(ids) for ids in answer_ids)
        with torch.inference_mode():
            output = self.model(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
                # Padding is on the left, so the answers' tokens, and those that they follow, stand at the end.
                logits_to_keep=longest + 1,
            )
            log_prob_NTV = output.logits[:, :-1].float().log_softmax(dim=-1)
            taken_NT = log_prob_NTV.gather(-1, input_ids[:, -longest:, None]).squeeze(-1)
        return [row[longest - len(ids) :] for row, ids in zip(taken_NT.tolist(), answer_ids, strict=True)]

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Any, Any]:
        """Token ids (N, T) with padding on the left, and the mask of what is none."""
        import torch

        width, pad = max(len(ids) for ids in rows), self.tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in rows], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows], device=self.model.device)
        return input_ids, mask

    def load_folder(self, folder: str) -> None:
        """See `Generator.load_folder`."""
        from transformers import AutoModelForCausalLM

        fresh = AutoModelForCausalLM.from_pretrained(folder, dtype=self.model.dtype, use_safetensors=True)
        self.model.load_state_dict(fresh.state_dict())


class ScriptedGenerator:
    """A generator whose answers are given by a function; for tests and dry trials.

    Args:
        answer: gives the text of an answer, from the prompt's ids and the row's seed.
        tokenizer: makes tokens of it.
        log_prob: gives the log-probability of each token of an answer, from the prompt's ids and the answer's text.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[int], int], str],
        tokenizer: Any,
        log_prob: Callable[[Sequence[int], str], float] = lambda ids, text: -1.0,
    ) -> None:
        self.answer = answer
        self.tokenizer = tokenizer
        self.log_prob = log_prob
        self.folder: str | None = None

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: "SamplingConfig",
        seed: int,
        progress: Progress | None = None,
    ) -> list[Generated]:
        """See `Generator.generate`; `answer(prompt_ids, row_seed)` gives the text."""
        generated = []
        for i, ids in enumerate(prompt_ids):
            text = self.answer(ids, _row_seed(seed, i))
            tokens = (*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id)
            kept = tokens[: sampling.max_new_tokens]
            generated.append(
                Generated(kept, self.tokenizer.decode(kept, skip_special_tokens=True), len(kept) < len(tokens))
            )
            if progress:
                progress(1)
        return generated

    def log_probs(
        self,
        prompt_ids: Sequence[Sequence[int]],
        answer_ids: Sequence[Sequence[int]],
        progress: Progress | None = None,
    ) -> list[list[float]]:
        """See `Generator.log_probs`; all tokens of an answer have the same."""
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in answer_ids]
        rows = zip(prompt_ids, answer_ids, texts, strict=True)
        found = [[self.log_prob(prompt, text)] * len(answer) for prompt, answer, text in rows]
        if progress:
            progress(len(found))
        return found

    def load_folder(self, folder: str) -> None:
        """Remember the folder; the answers stay the same."""
        self.folder = folder


def _row_seed(seed: int, row: int) -> int:
    # Distinct for all rows of a run, and below the 2**63 that vLLM and torch take.
    return (seed * 1_000_003 + row) % (2**63)
