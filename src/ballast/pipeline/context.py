"""What the stages of one run share: the configuration, the folder, and parts that are slow to make.

A part is made when a stage first asks for it, and kept: one vLLM engine serves measurements and training.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ballast.errors import ConfigError, DataError, ModelError
from ballast.guardrails.registry import load_guardrail
from ballast.guardrails.types import Guardrail
from ballast.models import resolve_model
from ballast.pipeline import ranks
from ballast.pipeline.config import RunConfig
from ballast.pipeline.config_inputs import SamplingConfig, TransformersGeneration
from ballast.pipeline.data import Row
from ballast.pipeline.evaluation.suites import SuitePrompt
from ballast.pipeline.generation import Generator, TransformersGenerator, VLLMGenerator
from ballast.pipeline.generation import Progress as Report
from ballast.pipeline.live_view import LiveTable
from ballast.pipeline.prompting import PromptFormat
from ballast.pipeline.run_folder import RunFolder
from ballast.pipeline.vllm_engine import VLLMEngine

_FORMATS = ("prompt_format", "serving_format")  # made from the configuration's prompts


class RunContext:
    """Shared by the stages of one call; `close` frees the engine.

    Args:
        config: the run.
        console: where lines, bars and tables go.
        live: show a training as one table drawn anew, where the console is a terminal; else as a line a step.
    """

    def __init__(self, config: RunConfig, console: Console | None = None, live: bool = True) -> None:
        self.config = config
        self.folder = RunFolder(Path(config.out).expanduser() / config.name)
        # Of processes that train together the main one speaks.
        self.console = console or Console(stderr=True, quiet=not ranks.is_main())
        # Interactive: a terminal, and one whose cursor can be moved.
        self.shows_table = live and self.console.is_interactive and ranks.is_main()
        self._loaded: str | None = None

    @cached_property
    def start_model(self) -> str:
        """Folder of the policy as it is before this run; a hub id is downloaded at its revision."""
        return resolve_model(self.config.model.name, self.config.model.revision)

    @property
    def reference_model(self) -> str:
        """What GRPO starts from: the aligned model where `align` is on, else the start model."""
        return str(self.folder.stage("align") / "model") if self.config.align.enabled else self.start_model

    @cached_property
    def tokenizer(self) -> Any:
        """The policy's tokenizer.

        Raises:
            ModelError: it cannot be loaded.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.start_model)
        # The tokenizers library raises what it likes, a bare Exception among it.
        except Exception as error:
            raise ModelError(
                f"the tokenizer of model '{self.config.model.name}' cannot be loaded ({_first_line(error)}); the folder "
                "needs tokenizer.json and tokenizer_config.json: save the tokenizer with save_pretrained beside the weights"
            ) from error
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @cached_property
    def prompt_format(self) -> PromptFormat:
        """The prompt format of this run's training."""
        options = self.config.prompting
        made = PromptFormat(self.tokenizer, options.system_prompt, options.policy, options.serving_system_prompt)
        default = made.contract().default_system_prompt
        if options.system_prompt is None and default is not None:
            self.say(
                f"[dim]the chat template adds a system prompt of its own: {escape(repr(default))}; "
                "prompting.system_prompt makes it explicit, or replaces it[/]"
            )
        return made

    @cached_property
    def serving_format(self) -> PromptFormat:
        """The prompt format in which models are measured, as they will be served."""
        return self.prompt_format.serving()

    @cached_property
    def guard(self) -> Guardrail:
        """The guardrail that rewards."""
        return load_guardrail(self.config.guard)

    @cached_property
    def judge(self) -> Guardrail:
        """The guardrail that measures."""
        return load_guardrail(self.config.judge)

    @cached_property
    def second_judge(self) -> Guardrail | None:
        """The second guardrail that measures; None where there is none."""
        options = self.config.evaluate.second_judge
        return None if options is None else load_guardrail(options.guard)

    @cached_property
    def engine(self) -> VLLMEngine:
        """The vLLM engine; only where `generation.type` is vllm. Processes that train together ask for theirs together."""
        options = self.config.generation
        assert not isinstance(options, TransformersGeneration)
        with self.console.status("starting vLLM"):
            # Engines of one seed would give equal samples to equal prompts, and a group may be spread over processes.
            seed = self.config.seed + ranks.rank()
            return VLLMEngine(self.start_model, options, self.config.model.dtype, seed, launched=ranks.world() > 1)

    def encode_prompts(
        self, rows: Sequence[Row | SuitePrompt], sampling: SamplingConfig, serving: bool = False
    ) -> list[list[int]]:
        """Token ids of requests, all of them checked before the first is answered.

        Args:
            rows: the requests.
            sampling: how long their answers may be.
            serving: in the format of serving instead of that of training.

        Raises:
            DataError: a request that does not fit vLLM together with its answer, or whose text cannot be told
                apart from the template's special tokens; the message names its row.
        """
        options = self.config.generation
        prompt_format = self.serving_format if serving else self.prompt_format
        encoded = [prompt_format.encode_request(row.id, row.prompt) for row in rows]
        if isinstance(options, TransformersGeneration):
            return encoded
        long = [(len(ids), row.id) for row, ids in zip(rows, encoded, strict=True)]
        long = [(n, row_id) for n, row_id in long if n + sampling.max_new_tokens > options.max_model_len]
        if long:
            tokens, row_id = max(long)
            raise DataError(
                f"{len(long)} of {len(rows)} prompts are too long for generation.max_model_len = {options.max_model_len}; the longest, "
                f"row {row_id}, has {tokens} tokens, and sampling.max_new_tokens = {sampling.max_new_tokens} come on top: raise "
                f"generation.max_model_len to {tokens + sampling.max_new_tokens}, lower max_new_tokens, or drop the rows"
            )
        return encoded

    def generator(self, model: str) -> Generator:
        """A generator that holds the weights of `model`, a a folder of the policy's architecture."""
        generator = self._generator
        if self._loaded != model:
            if not (self._loaded is None and model == self.start_model):
                generator.load_folder(model)
            self._loaded = model
        return generator

    def forget_weights(self) -> None:
        """Training has put other weights into the engine: load them anew at the next `generator` call."""
        self._loaded = "weights of a trainer"

    @cached_property
    def _generator(self) -> Generator:
        options = self.config.generation
        if isinstance(options, TransformersGeneration):
            model = load_policy(self.start_model, self.config.model.dtype)
            return TransformersGenerator(model.eval(), self.tokenizer, options.batch_size)
        return VLLMGenerator(self.engine, self.tokenizer)

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Report]:
        """A progress bar, gone at the end; the block gets a function that adds to it. Silent outside a terminal."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        # A live display writes blank lines into a log file.
        shown = self.console.is_terminal and not self.console.quiet
        with Progress(*columns, console=self.console, transient=True, disable=not shown) as bar:
            task = bar.add_task(label, total=total)
            yield lambda done: bar.advance(task, done)

    @contextmanager
    def configured(self, config: RunConfig) -> Iterator[None]:
        """Another configuration of the same model, generator and guards counts inside the block, such as one of another prompt."""
        before, made = self.config, {name: self.__dict__.pop(name) for name in _FORMATS if name in self.__dict__}
        self.config = config
        try:
            yield
        finally:
            self.config = before
            for name in _FORMATS:
                self.__dict__.pop(name, None)
            self.__dict__.update(made)

    @contextmanager
    def live(self, stage: str) -> Iterator[None]:
        """A table of the training in the block, which stays as it is at the end; lines that are said meanwhile go above it.

        Args:
            stage: whose lines of metrics.jsonl it shows.
        """
        if not self.shows_table:
            yield
            return
        table = LiveTable(stage)
        with Live(table, console=self.console, refresh_per_second=2), self.folder.followed_by(table.read):
            yield

    def say(self, text: str) -> None:
        """One line to the terminal. Never the text of a prompt or a completion."""
        self.console.print(text, highlight=False, soft_wrap=not self.console.is_terminal)

    def close(self) -> None:
        """Free the engine."""
        if "engine" in self.__dict__:
            self.engine.close()


def check_one_device() -> None:
    """Each process that trains does so on one device.

    Raises:
        ConfigError: more than one GPU is visible, and this is the only process.
    """
    import torch

    gpus = torch.cuda.device_count()
    if ranks.world() == 1 and gpus > 1:
        raise ConfigError(
            f"{gpus} GPUs are visible, and this is one process, which trains on one device: add --launch ddp to train on all of "
            "them, or set CUDA_VISIBLE_DEVICES=0"
        )


def load_policy(model: str, dtype: str) -> Any:
    """The policy's weights for training, on the GPU where there is one.

    Args:
        model: folder with safetensors.
        dtype: `bfloat16` or `float32`.

    Raises:
        ModelError: the weights cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        policy = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model '{model}' cannot be loaded ({_first_line(error)}); check model.name and model.revision"
        ) from error
    return policy.to("cuda") if torch.cuda.is_available() else policy


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
