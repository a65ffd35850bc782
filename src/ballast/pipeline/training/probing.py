"""Safety-aware probing (SAP, arXiv 2505.16737) for any Trainer: a mixin in front of its class.

    class ProbedSFT(SafetyProbing, SFTTrainer): ...
    trainer = ProbedSFT(model, args, rows, probing=ProbingConfig(), safety_pairs=pairs)

A step, with W the trained weights, L_safe the contrastive loss of the safety pairs and V vectors on hidden states:

    dW = step * |W| * g / |g|,  g = grad_W L_safe        the harmful direction, once an optimizer step
    V  = beta * grad_V [L(W + dW, V) - L(W, V)] at V = 0  where the harmful step helps the task less
    W  is then moved by the gradient of L(W, V)

`fresh` computes V for the very micro-batch. `stale` uses the V of the step before and so saves a pass; its gradients are
taken at that V, which is what the published code does. One vector a layer, the same at every token: the bias of the MLP in
the published code.

Processes that train together share the pairs of a step out and have one direction, and their stale V is of all rows: the
gradient is that of one process with as many more micro-batches. Overridden: `training_step`, `compute_loss`; nothing is copied.
"""

import copy
import math
import random
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from ballast.errors import BallastError, ConfigError, DataError
from ballast.pipeline import ranks
from ballast.pipeline.config_probing import ProbingConfig
from ballast.pipeline.training.layers import decoder_layers, layers_path
from ballast.pipeline.training.logged_means import LoggedMeans
from ballast.pipeline.training.probe import Probe, cosine, norm, probe_vectors, stepped
from ballast.pipeline.training.safegrad.safety_gradient import sum_over_processes
from ballast.pipeline.training.safety_pairs import SafetyPair, contrastive_loss

DEFAULT = ProbingConfig()

# Length of the harmful step as a share of the weights' norm: the paper's, and one whose effect bfloat16 can tell.
STEP, STEP_IN_HALF_PRECISION = 2e-5, 3e-2

_HALF = (torch.bfloat16, torch.float16)

# What trainers count or log inside `compute_loss`; the passes of the probe leave no trace in it.
_COUNTED = ("_metrics", "_sums", "_total_train_tokens")


class SafetyProbing(LoggedMeans):
    """Mixin: a Trainer whose steps are probed. Put it before the trainer's class.

    Logged beside the trainer's own figures: `probing/safety_loss`, `probing/cosine` of task and safety gradient (below 0:
    the step makes harm likelier) and `probing/cosine/layer_N`, `probing/rms` of the probe, `probing/difference` (norm of
    the gradients' difference relative to the gradient), and `probing/seconds` of the extra passes of a step.

    Args:
        probing: how to probe.
        safety_pairs: what the harmful direction is taken from, see `encode_pairs`.

    Raises:
        ConfigError: weights that are trained in half precision or sharded, fp16, or reentrant checkpointing.
        DataError: no pair.
    """

    model: Any
    args: Any
    accelerator: Any
    state: Any
    model_accepts_loss_kwargs: bool
    compute_loss_func: Any
    current_gradient_accumulation_steps: int

    def __init__(
        self, *args: Any, probing: ProbingConfig = DEFAULT, safety_pairs: Sequence[SafetyPair], **kwargs: Any
    ) -> None:
        if not safety_pairs:
            raise DataError("probing has no safety pairs to take the harmful direction from; give at least one")
        super().__init__(*args, **kwargs)
        self.probing = probing
        self.safety_pairs = list(safety_pairs)
        self._check_training()
        self._probe = Probe(self.model, probed_layers(probing, len(decoder_layers(self.model))))
        self._stale: dict[int, torch.Tensor] = {}
        self._harmful_sum: dict[int, torch.Tensor] = {}
        self._direction: list[torch.Tensor] | None = None
        self._direction_step = -1
        self._skipped = 0
        self._stepping = False

    def _check_training(self) -> None:
        half = [n for n, p in self._trained() if p.dtype in _HALF]
        if half:
            raise ConfigError(
                f"probing needs trained weights in float32, and '{half[0]}' is in half precision, where a small step is rounded away; load the model in float32 with bf16=True (autocast), or train a LoRA"
            )
        reentrant = (self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
        refused = {
            "fp16 = True": self.args.fp16,
            "FSDP": bool(getattr(self, "is_fsdp_enabled", False)),
            "DeepSpeed": bool(getattr(self, "is_deepspeed_enabled", False)),
            "gradient_checkpointing_kwargs use_reentrant = True": self.args.gradient_checkpointing and reentrant,
        }
        for what, given in refused.items():
            if given:
                raise ConfigError(
                    f"probing does not work with {what}: it takes gradients of single tensors and moves the weights for a pass; "
                    "use bf16 or fp32, one device or DDP, and use_reentrant=False"
                )

    @property
    def _step_share(self) -> float:
        if self.probing.step is not None:
            return self.probing.step
        half = self.args.bf16 or any(p.dtype in _HALF for p in self.model.parameters())
        return STEP_IN_HALF_PRECISION if half else STEP

    @property
    def _micro_batches(self) -> int:
        return self.current_gradient_accumulation_steps

    def _trained(self) -> list[tuple[str, torch.Tensor]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def checkpoint_state(self) -> dict[str, Any]:
        """The vectors of the step before, and how many directions failed in a row."""
        return {"stale": {n: vector.detach() for n, vector in self._stale.items()}, "skipped": self._skipped}

    def restore_checkpoint_state(self, state: dict[str, Any]) -> None:
        """Go on from them."""
        device = self.accelerator.device
        self._stale = {n: vector.to(device).requires_grad_() for n, vector in state["stale"].items()}
        self._skipped = state["skipped"]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own, in whose loss the probe stands; it is off again when the step ends."""
        self._stepping = True
        try:
            loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
            self._after_backward()
            return loss
        finally:
            self._stepping = False
            self._probe.vectors = {}

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's loss; inside a training step, of the model with the probe."""

        def loss_of(some_model: Any, some_inputs: Any, outputs: bool = False) -> Any:
            return super(SafetyProbing, self).compute_loss(  # type: ignore[misc]
                some_model, some_inputs, outputs, num_items_in_batch
            )

        if self._stepping:
            started = time.perf_counter()
            self._prepare_direction()
            if self._direction is not None:
                bare = self.accelerator.unwrap_model(model)
                # Whatever the trainer divides by between loss and backward.
                unscaled = not self.model_accepts_loss_kwargs or num_items_in_batch is None
                divisor = self._micro_batches if unscaled and self.compute_loss_func is None else 1
                self._set_probe(lambda: loss_of(bare, copy.copy(inputs)) / divisor)
            self.note_mean("probing/seconds", time.perf_counter() - started, 0.0)
        return loss_of(model, inputs, return_outputs)

    def _set_probe(self, loss: Callable[[], torch.Tensor]) -> None:
        """Put the vectors of this pass into the probe; costs one pass where stale, two where fresh."""
        if self.probing.probe == "stale":
            self._stale = self._stale or self._probe.zeros()
            for n, slope in self._slope(loss, self._stale, after_step=True).items():
                self._harmful_sum[n] = self._harmful_sum.get(n, 0.0) + slope
            # The pass that trains gives the other gradient on its way back.
            self._probe.vectors = self._stale
            self._note("rms", _rms(self._stale))
            return
        zeros = self._probe.zeros()
        harmful = self._slope(loss, zeros, after_step=True)
        plain = self._slope(loss, zeros, after_step=False)
        vectors = probe_vectors(harmful, plain, self.probing.beta, self.probing.scale, self._micro_batches)
        self._probe.vectors = vectors
        self._note_difference(harmful, plain)
        self._note("rms", _rms(vectors))

    def _slope(
        self, loss: Callable[[], torch.Tensor], vectors: dict[int, torch.Tensor], after_step: bool
    ) -> dict[int, torch.Tensor]:
        """d loss / d vector of each layer, with the weights moved by the harmful step or not; nothing else changes."""
        leaves = {n: vector.detach().clone().requires_grad_() for n, vector in vectors.items()}
        trained = [p for _, p in self._trained()]
        assert self._direction is not None
        moved = stepped(trained, self._direction, self._step_share) if after_step else nullcontext()
        with self._untraced(), moved:
            self._probe.vectors = leaves
            value = loss()
            with torch.autocast(value.device.type, enabled=False):
                slopes = torch.autograd.grad(value, list(leaves.values()))
        return dict(zip(leaves, slopes, strict=True))

    @contextmanager
    def _untraced(self) -> Iterator[None]:
        """Random numbers and the trainer's counters as if the block had not been: every pass then has the same dropout."""
        kept = {name: copy.deepcopy(getattr(self, name)) for name in _COUNTED if hasattr(self, name)}
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):
                yield
        finally:
            for name, value in kept.items():
                setattr(self, name, value)
            self._probe.vectors = {}

    def _prepare_direction(self) -> None:
        """The harmful direction of this optimizer step, computed at its first micro-batch."""
        if self._direction_step == self.state.global_step:
            return
        self._direction_step = self.state.global_step
        trained = [p for _, p in self._trained()]
        pairs = self._pairs_of_step()
        own = ranks.own_share(pairs)
        direction, loss = [torch.zeros_like(p) for p in trained], 0.0
        if own:
            direction, loss = self._pulled_by(own, trained, len(own) / len(pairs))
        if ranks.world() > 1:
            sum_over_processes(direction)
        length = norm(direction)
        self._note("safety_loss", loss, len(own))
        self.note_mean("probing/seconds", 0.0, 1.0)  # per step, whatever the number of its micro-batches
        usable = math.isfinite(length) and length > 0
        self._direction = direction if usable else None
        self._skipped = 0 if usable else self._skipped + 1
        self._note("skipped", float(not usable))
        if self._skipped > self.probing.max_skipped:
            raise BallastError(
                f"the harmful direction was 0 or not finite in {self._skipped} steps in a row (norm {length}), so nothing was probed; "
                "look at loss and grad_norm in the log, lower the learning rate, or switch probing off"
            )

    def _pulled_by(
        self, pairs: Sequence[SafetyPair], trained: Sequence[torch.Tensor], share: float
    ) -> tuple[list[torch.Tensor], float]:
        """The gradient of the pairs' mean loss, times a share, and the loss."""
        was_training = self.model.training
        self.model.eval()  # no dropout, so no random numbers are used up
        try:
            with self.accelerator.autocast():
                loss = contrastive_loss(self.model, pairs, self.probing.temperature)
            slopes = torch.autograd.grad(share * loss, trained, allow_unused=True)
        finally:
            self.model.train(was_training)
        direction = [torch.zeros_like(p) if g is None else g.contiguous() for p, g in zip(trained, slopes, strict=True)]
        return direction, loss.item()

    def _pairs_of_step(self) -> list[SafetyPair]:
        """Those of all processes together, which share them out."""
        # By the step alone, so that a resumed run draws the same.
        draw = random.Random(f"{self.args.seed}/{self.state.global_step}")
        return draw.sample(self.safety_pairs, min(self.probing.batch_size, len(self.safety_pairs)))

    def _after_backward(self) -> None:
        """At the end of an optimizer step: the next stale vectors, and how task and safety gradient lie to each other."""
        if not self.accelerator.sync_gradients or self._direction is None:
            return
        if self.probing.probe == "stale":
            plain = {n: torch.zeros_like(v) if v.grad is None else v.grad for n, v in self._stale.items()}
            harmful, plain = _averaged(self._harmful_sum), _averaged(plain)
            self._note_difference(harmful, plain)
            vectors = probe_vectors(harmful, plain, self.probing.beta, self.probing.scale)
            self._stale = {n: vector.requires_grad_() for n, vector in vectors.items()}
            self._harmful_sum = {}
        names = [name for name, _ in self._trained()]
        task = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in self._trained()]
        self._note("cosine", cosine(task, self._direction))
        for layer, own in _by_layer(names, layers_path(self.model)).items():
            value = cosine([task[i] for i in own], [self._direction[i] for i in own])
            self._note(f"cosine/layer_{layer}", value)

    def _note_difference(self, harmful: dict[int, torch.Tensor], plain: dict[int, torch.Tensor]) -> None:
        length = norm(list(plain.values()))
        if length > 0:
            self._note("difference", norm([harmful[n] - plain[n] for n in plain]) / length)

    def _note(self, name: str, value: float, weight: float = 1.0) -> None:
        if math.isfinite(value):
            self.note_mean(f"probing/{name}", value * weight, weight)


def probed_layers(probing: ProbingConfig, layers: int) -> range:
    """The layers to probe in a model of so many: those of the configuration, or the paper's share of the depth.

    Raises:
        ConfigError: the model is not that deep.
    """
    if probing.layers is None:
        return range(round(layers * 11 / 32), min(layers - 1, round(layers * 20 / 32)) + 1)
    first, last = probing.layers
    if last >= layers:
        raise ConfigError(
            f"probing.layers = [{first}, {last}]: the model has the layers 0 to {layers - 1}; name some of them"
        )
    return range(first, last + 1)


def _by_layer(names: Sequence[str], path: str) -> dict[int, list[int]]:
    """Layer to the places of its parameters in `names`."""
    found: dict[int, list[int]] = defaultdict(list)
    pattern = re.compile(rf"(?:^|\.){re.escape(path)}\.(\d+)\.")
    for place, name in enumerate(names):
        if match := pattern.search(name):
            found[int(match.group(1))].append(place)
    return dict(found)


def _averaged(slopes: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Over the processes, as DDP averages the gradients of the weights."""
    if ranks.world() > 1:
        slopes = {n: slope / ranks.world() for n, slope in slopes.items()}
        sum_over_processes(list(slopes.values()))
    return slopes


def _rms(vectors: dict[int, torch.Tensor]) -> float:
    return norm(list(vectors.values())) / math.sqrt(sum(vector.numel() for vector in vectors.values()))
