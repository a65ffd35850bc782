"""SafeGrad as one callback for any transformers or TRL trainer.

Read against transformers 5.17: `on_pre_optimizer_step` comes once an optimizer step, after clipping, when `.grad` holds the
accumulated and averaged gradient; `on_optimizer_step` comes after the update, before the learning rate changes. What
reaches the optimizer is

    clip(project(clip(u)) + rho * a)

    u task gradient   a gradient of the safety loss
"""

from contextlib import nullcontext
from typing import Any, Literal

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ballast.errors import BallastError, ConfigError
from ballast.pipeline.training.safegrad.alignment_set import alignment_batches
from ballast.pipeline.training.safegrad.modes import Mode, Project, Update, made_mode
from ballast.pipeline.training.safegrad.options import Options
from ballast.pipeline.training.safegrad.projection import products
from ballast.pipeline.training.safegrad.safety_gradient import Ranks
from ballast.pipeline.training.safegrad.safety_loss import Objective, SafetyLoss, without_gradient
from ballast.pipeline.training.safegrad.support import check_support, is_fsdp, is_sharded


class SafeGrad(TrainerCallback):
    """Keeps every update from pushing against safety: `callbacks=[SafeGrad(refusals)]`.

    The safety gradient a is that of KL(pi_ref || pi) on completion tokens of an alignment set, pi_ref being the policy as
    it is when the trainer is made. Where the accumulated task gradient u has a negative dot product with a, over all
    trainable parameters together, its part along a is taken out; then rho * a is added (arXiv 2508.07172).

    It costs a forward and a backward of one alignment batch in every `every_n_steps`-th step, and the memory of one
    copy of the trainable gradients. A trainer has at most one.

    Args:
        alignment_dataset: answers that the model should go on giving, above all refusals of harmful prompts; rows as TRL
            takes them (`prompt`, `completion`, conversational or text) or tokenised (`input_ids`, `completion_mask`).
            10 to 20 are enough for the KL, the cross-entropy needs 100 or more.
        rho: weight of the safety gradient; 0 projects only.
        every_n_steps: optimizer steps between safety gradients; between them the last one is used again, unless it was below
            `noise_floor`: then the next step asks anew. In the other modes, steps between two checks.
        batch_size: alignment rows a safety gradient, on each process.
        projection: `global` projects; `none` is the ablation that only adds rho * a.
        metric: `euclidean`, or `adam`: the projection then holds for what Adam makes of the gradient.
        mode: `project`; `trust_region`, which steps back after an update that left safety (SPARD); or `watchdog`, which
            measures the safety loss before and after each update, and shortens or undoes an update that raised it.
        objective: `kl` or `ce`, the cross-entropy of the completions; None takes `ce` for trust_region, else `kl`.
        reference: a model to stay near instead of the policy as it is when the trainer is made.
        cache_reference: compute the reference once and keep its hidden states in the CPU's memory; False runs it with each
            batch, as the policy with a new adapter switched off, or as a frozen copy.
        max_length: tokens of an alignment row, above which its completion is cut; None refuses rows longer than the context.
        noise_floor: least <a, a> / <u, u>; below it a is rounding noise, as at the start, and u stays as it is.
        max_skipped: updates that may be skipped because the safety loss or its gradient is no number; one more stops the run.
        margin: for trust_region: nats a token above the start model's loss that are left alone; below 0 it asks for less loss
            than the start model's.
        max_step: for trust_region: longest step back, in learning rates' units; None takes the current learning rate.
        tolerance: for watchdog: rise of the safety loss that one update may bring, in nats a token.
        budget: for watchdog: rise since the start; None has no limit.
        halvings: for watchdog: how often an update is halved before it is undone.
        chunk_tokens: tokens whose whole distribution is in memory at a time.
        log_layers: log the cosine of both gradients in every layer.
        tokenizer: for rows that are not tokenised; None takes the trainer's `processing_class`.
        seed: of the order of the alignment batches.

    Figures go into the trainer's log as `safegrad/...`: means since the last log, `safegrad/skipped` the total.

    Raises:
        ConfigError: an option out of range; when the trainer is made or its training begins, a second SafeGrad in it, or a
            trainer in which SafeGrad cannot be correct (`support.check_support`); when training begins, a resumed one whose
            start model is not to be had.
        DataError: when the trainer is made, an alignment set that is empty, without completions or too long.
        BallastError: in training, more than `max_skipped` updates were skipped; at its end, weights that are no numbers.
    """

    def __init__(
        self,
        alignment_dataset: Any,
        *,
        rho: float = 1.0,
        every_n_steps: int = 1,
        batch_size: int = 8,
        projection: Literal["global", "none"] = "global",
        metric: Literal["euclidean", "adam"] = "euclidean",
        mode: Literal["project", "trust_region", "watchdog"] = "project",
        objective: Objective | None = None,
        reference: Any = None,
        cache_reference: bool = True,
        max_length: int | None = None,
        noise_floor: float = 1e-8,
        max_skipped: int = 5,
        margin: float = 0.0,
        max_step: float | None = None,
        tolerance: float = 0.01,
        budget: float | None = None,
        halvings: int = 3,
        chunk_tokens: int = 128,
        log_layers: bool = False,
        tokenizer: Any = None,
        seed: int = 0,
    ) -> None:
        self.alignment_dataset = alignment_dataset
        self.reference = reference
        self.tokenizer = tokenizer
        self.options = Options(
            rho=rho,
            every_n_steps=every_n_steps,
            batch_size=batch_size,
            projection=projection,
            metric=metric,
            mode=mode,
            objective=("ce" if mode == "trust_region" else "kl") if objective is None else objective,
            cache_reference=cache_reference,
            max_length=max_length,
            noise_floor=noise_floor,
            max_skipped=max_skipped,
            margin=margin,
            max_step=max_step,
            tolerance=tolerance,
            budget=budget,
            halvings=halvings,
            chunk_tokens=chunk_tokens,
            log_layers=log_layers,
            seed=seed,
        )
        self.skipped = 0
        self._loss: SafetyLoss | None = None
        self._start: list[float] = []
        self._mode: Mode | None = None
        self._parameters: list[torch.nn.Parameter] = []
        self._figures: dict[str, list[float]] = {}

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Check the trainer; take the policy as it is now for the reference: a checkpoint that training resumes from is loaded later."""
        self._check(args, state, model)
        if not is_fsdp():  # its parameters are not sharded yet, and may not be loaded
            self._prepare(args, model, processing_class)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Check the trainer as it is now, and begin."""
        self._check(args, state, model)
        if self._loss is None:
            reads_start = self.options.mode != "project" or (self.options.objective == "kl" and self.reference is None)
            if state.global_step > 0 and reads_start:
                raise ConfigError(
                    f"SafeGrad joins a training that is resumed at step {state.global_step}, so the model is no longer the start model that "
                    "it compares with; give SafeGrad in `callbacks` when the trainer is made, or, under FSDP2 and with mode='project', "
                    "give it the start model as `reference`"
                )
            self._prepare(args, model, processing_class)
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert self._loss is not None
        self._mode = made_mode(self._loss, self._start, self.options)

    def checkpoint_state(self) -> dict[str, Any]:
        """The safety gradient that is used again, and how many updates were skipped."""
        return {"skipped": self.skipped, "project": self._mode.state() if isinstance(self._mode, Project) else {}}

    def restore_checkpoint_state(self, state: dict[str, Any]) -> None:
        """Go on from both."""
        self.skipped = state["skipped"]
        if isinstance(self._mode, Project):
            self._mode.restore(state["project"], self._parameters[0].device)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Change the gradient that the optimizer gets."""
        assert self._mode is not None
        self._note(self._mode.before(self._update(args, state, model, optimizer)), state)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Change the weights that the optimizer made."""
        assert self._mode is not None
        if not isinstance(self._mode, Project):
            self._note(self._mode.after(self._update(args, state, model, optimizer)), state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let no model go that is no numbers: of the updates after the last check nobody has looked at one."""
        if not products(self._parameters, self._parameters).finite[0]:
            raise BallastError(
                f"SafeGrad: after {state.global_step} steps the trained weights are no numbers any more, so there is no model to save. Lower the "
                "learning rate, train in bf16 or fp32 instead of fp16, or go on from an earlier checkpoint"
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the figures to the trainer's history, and to what later callbacks are given."""
        if logs is None or "loss" not in logs:
            return
        figures = {f"safegrad/{name}": sum(values) / len(values) for name, values in self._figures.items()}
        figures["safegrad/skipped"] = self.skipped
        self._figures.clear()
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)

    def _check(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        # The one object that all callbacks of a trainer are given; what is no field of it is in no checkpoint.
        if vars(state).setdefault("_safegrad", id(self)) != id(self):
            raise ConfigError(
                "this trainer has a SafeGrad already, and two would change each other's update and share one place in a checkpoint; keep "
                "one, of the mode that you need most"
            )
        check_support(args, model)

    def _prepare(self, args: TrainingArguments, model: Any, processing_class: Any) -> None:
        tokenizer = self.tokenizer if self.tokenizer is not None else processing_class
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor for several kinds of input
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        batches = alignment_batches(
            self.alignment_dataset, tokenizer, self.options.batch_size, self.options.max_length, context
        )
        kind = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        device = next(model.parameters()).device.type

        def precision() -> Any:
            return nullcontext() if kind is None else torch.autocast(device, dtype=kind)

        loss = SafetyLoss(
            batches, self.options.objective, precision, self.options.chunk_tokens, whole_model=is_sharded(model)
        )
        if self.reference is not None and self.options.objective == "kl":
            given = self.reference.eval().requires_grad_(False).to(next(model.parameters()).device)
            loss.take_reference(given, self.options.cache_reference)
            self.reference = None  # where it is cached, nothing holds it any more
        else:
            loss.take_start(model, self.options.cache_reference)
        if self.options.mode != "project":
            with without_gradient(model):
                self._start = [float(loss.summed(model, number)) for number in range(len(batches))]
        self._loss = loss

    def _update(self, args: TrainingArguments, state: TrainerState, model: Any, optimizer: Any) -> Update:
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        ranks = Ranks(args.world_size, args.process_index)
        return Update(state.global_step, model, self._parameters, inner, args.max_grad_norm or 0.0, ranks)

    def _note(self, figures: dict[str, float], state: TrainerState) -> None:
        assert self._mode is not None
        for name, value in figures.items():
            self._figures.setdefault(name, []).append(value)
        if not self._mode.failed:
            return
        self._mode.failed = False
        self.skipped += 1
        if self.skipped > self.options.max_skipped:
            raise BallastError(
                f"SafeGrad at step {state.global_step}: {self.skipped} updates were skipped because the safety loss or its gradient was no "
                f"number, and max_skipped is {self.options.max_skipped}. Lower the learning rate, train in bf16 or fp32 instead of fp16, or look at "
                "the alignment rows"
            )
