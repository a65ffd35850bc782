"""What every guard on a causal language model shares: loading, its self-check, and verdicts to traces.

A family (a subclass in its own file) says how an exchange is written and how a verdict is spelled; an engine
reads the distribution of the token that comes next. The share of its probability on any label, the label
mass, says whether the prompt ends where the model expects to give its verdict.
"""

import logging
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ballast.errors import GuardError, ModelError
from ballast.guardrails.engines.options import AutoEngine, EngineOptions
from ballast.guardrails.engines.server_state import ServerHealth
from ballast.guardrails.families.frame import Renderer, UnrenderableError
from ballast.guardrails.remote import servers_of
from ballast.guardrails.types import Exchange, RiskTrace
from ballast.models import resolve_model

if TYPE_CHECKING:
    from ballast.guardrails.engines.interface import Labels, Verdict, VerdictEngine

_log = logging.getLogger(__name__)

# One toy exchange of each kind: a guard that cannot tell these apart can tell nothing apart.
TOY_SAFE = Exchange(({"role": "user", "content": "What is the capital of France?"},), "The capital of France is Paris.")
TOY_UNSAFE = Exchange(
    ({"role": "user", "content": "What should I do about my neighbour?"},),
    "Your neighbour deserves to be hurt. Wait for him tonight and beat him until he cannot stand.",
)


class VerdictOptions(BaseModel):
    """Options that every guard on a causal model has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: str
    model: str = Field(description="`embedded:smollm2-135m`, a local model folder, or a hub id; never the policy")
    revision: str | None = Field(default=None, description="commit or tag of a hub id; None takes its default branch")
    engine: EngineOptions = Field(
        default=AutoEngine(), description="how prompts are run: `auto`, `one_pass`, `server` and others, or a mapping"
    )
    verdict_prefix: str = Field(
        default="",
        description="text of the guard's turn before its verdict, e.g. a newline or `Safety:`; empty for none",
    )
    min_label_mass: float = Field(
        default=0.9,
        ge=0.0,
        le=1.0,
        description="share of probability in [0, 1] that must lie on the labels; below it the template likely does not fit",
    )
    self_check: Literal["strict", "warn", "off"] = Field(
        default="strict",
        description="before the first use, judge one harmless and one harmful toy answer: `strict` refuses a guard that fails, `warn` logs it",
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="precision of the weights; logits are read in float32"
    )
    device: str = Field(default="auto", description="where the guard runs; auto takes cuda where there is one")
    batch_size: int = Field(default=16, ge=1, description="prompts a forward")


class VerdictGuard:
    """A causal model asked for a verdict at every cut.

    The model is loaded, and checked on two toy exchanges, at first use; calls from several threads take
    turns. `name` is the family and the last part of the model's name. A family with several policies is asked
    once a policy: the risk is the largest, and the trace's category names its policy.

    A family overrides `renderer` and `spellings`.
    """

    def __init__(self, options: VerdictOptions) -> None:
        self.options = options
        self.name = f"{options.type}:{options.model.rstrip('/').rsplit('/', 1)[-1].removeprefix('embedded:')}"
        self._lock = threading.RLock()
        self._loaded: tuple[Renderer, VerdictEngine] | None = None

    def renderer(self, tokenizer: Any) -> Renderer:
        """How this family writes an exchange, with the guard's tokenizer."""
        raise NotImplementedError

    def spellings(self) -> tuple[Sequence[str], Sequence[str]]:
        """How a safe and how an unsafe verdict may begin, with leading spaces if any."""
        raise NotImplementedError

    def assess(self, exchanges: Sequence[Exchange], cuts: Sequence[Sequence[int]]) -> list[RiskTrace]:
        """Judge each response at each of its cuts; see `Guardrail.assess`.

        Messages that the family has no form for, a prompt longer than the model's context, text that is not
        valid Unicode and logits that are not finite are unscored. `label_mass` of a trace is the lowest over
        its cuts.

        Raises:
            GuardError: at first use, when the guard fails its self-check.
            ModelError: at first use, when the model cannot be loaded or has no chat template.
        """
        with self._lock:
            if self._loaded is None:
                loaded = self._load()
                self._check(*loaded)
                self._loaded = loaded
            traces = self._assess(*self._loaded, exchanges, cuts)
        low = [
            trace.label_mass
            for trace in traces
            if trace.label_mass is not None and trace.label_mass < self.options.min_label_mass
        ]
        if low:
            _log.warning(
                "%s: label mass below %s in %d of %d traces (lowest %.3f)",
                self.name,
                self.options.min_label_mass,
                len(low),
                len(traces),
                min(low),
            )
        return traces

    def self_check(self) -> None:
        """Load the guard and judge the toy exchanges now, rather than at first use.

        Raises:
            GuardError: the labels cannot be told apart, or the check failed and `self_check` is strict.
            ModelError: the model cannot be loaded or has no chat template.
        """
        with self._lock:
            self._loaded = self._loaded or self._load()
            self._check(*self._loaded)

    def servers(self) -> tuple[ServerHealth, ...]:
        """(S,) what is known of the engine's servers; none before the first use, or for an engine that asks none."""
        return servers_of(self._loaded[1]) if self._loaded else ()

    def _load(self) -> "tuple[Renderer, VerdictEngine]":
        from transformers import AutoTokenizer

        from ballast.guardrails.engines.build import build_engine

        options = self.options
        source = resolve_model(options.model, options.revision)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"guardrail '{self.name}': the tokenizer of '{options.model}' could not be loaded ({error}); check its name, folder or access"
            ) from error
        renderer = self.renderer(tokenizer)
        # The prompt is looked at before gigabytes of weights are loaded.
        labels = self._labels(renderer)
        engine = build_engine(
            options.engine,
            model=options.model,
            revision=options.revision,
            labels=labels,
            dtype=options.dtype,
            device=options.device,
            batch_size=options.batch_size,
            guard=self.name,
        )
        return renderer, engine

    def _labels(self, renderer: Renderer) -> "Labels":
        from ballast.guardrails.engines.interface import Labels

        safe, unsafe = self.spellings()
        safe_ids, unsafe_ids = renderer.label_ids(safe), renderer.label_ids(unsafe)
        if shared := safe_ids & unsafe_ids:
            raise GuardError(
                f"guardrail '{self.name}': the safe labels {list(safe)} and the unsafe labels {list(unsafe)} begin with the same token {sorted(shared)}, "
                f"so one token cannot tell them apart; give labels that differ in their first token, or a model whose tokenizer knows them"
            )
        return Labels(tuple(sorted(safe_ids)), tuple(sorted(unsafe_ids)))

    def _assess(
        self,
        renderer: Renderer,
        engine: "VerdictEngine",
        exchanges: Sequence[Exchange],
        cuts: Sequence[Sequence[int]],
    ) -> list[RiskTrace]:
        from ballast.guardrails.engines.interface import Verdict

        policies = len(renderer.policies)
        groups: list[list[list[int]]] = []  # one an exchange and policy: its prompts share their beginning
        slots: list[list[int | Verdict]] = []  # per cut: the number of its prompt in the groups, or why it has none
        for exchange, asked in zip(exchanges, cuts, strict=True):
            own: list[list[list[int]]] = [[] for _ in range(policies)]
            row: list[int | Verdict] = []
            for cut in asked:
                try:
                    prompts = renderer.render(exchange.messages, exchange.response[:cut])
                except UnrenderableError as error:
                    row.append(Verdict(None, reason=str(error)))
                    continue
                row.append(len(own[0]))
                for group, prompt in zip(own, prompts, strict=True):
                    group.append(prompt)
            groups += own
            slots.append(row)
        scored = engine.score(groups)
        traces = []
        for number, (asked, row) in enumerate(zip(cuts, slots, strict=True)):
            mine = scored[number * policies : (number + 1) * policies]
            at_cuts = [[v[slot] for v in mine] if isinstance(slot, int) else [slot] * policies for slot in row]
            traces.append(_trace(asked, at_cuts, renderer.policies))
        return traces

    def _check(self, renderer: Renderer, engine: "VerdictEngine") -> None:
        if self.options.self_check == "off":
            return
        toys = [TOY_SAFE, TOY_UNSAFE]
        safe, unsafe = self._assess(renderer, engine, toys, [(len(toy.response),) for toy in toys])
        problem = renderer.bos_problem() or self._problem(safe, unsafe)
        if problem and self.options.self_check == "strict":
            raise GuardError(f"guardrail '{self.name}': {problem}")
        if problem:
            _log.warning("guardrail '%s': %s", self.name, problem)

    def _problem(self, safe: RiskTrace, unsafe: RiskTrace) -> str | None:
        (risk_safe,), (risk_unsafe,) = safe.risk, unsafe.risk
        if risk_safe is None or risk_unsafe is None:
            return f"the self-check's toy exchanges were not scored ({safe.reason or unsafe.reason}); use a model with sound weights and a longer context"
        mass = min(safe.label_mass or 0.0, unsafe.label_mass or 0.0)
        if mass < self.options.min_label_mass:
            labels = ", ".join(repr(label) for labels in self.spellings() for label in labels)
            return (
                f"label mass {mass:.3g} < {self.options.min_label_mass} on the self-check, so the prompt likely does not end where the verdict "
                f"begins; set verdict_prefix (now {self.options.verdict_prefix!r}) and the labels (now {labels}) to what the model writes first"
            )
        if risk_unsafe <= risk_safe:
            return (
                f"the self-check's harmful answer has risk {risk_unsafe:.3f} and the harmless one {risk_safe:.3f}, so the guard judges no better "
                f"than chance; swap the labels if they are the wrong way round, change template, or use a stronger model"
            )
        return None


def _trace(cuts: Sequence[int], verdicts: "Sequence[Sequence[Verdict]]", policies: Sequence[str | None]) -> RiskTrace:
    """A trace from (K, P) verdicts. A cut that one policy did not score is unscored: that one might be the worst."""
    risk: list[float | None] = []
    category: list[str | None] = []
    for at_cut in verdicts:
        known = [
            (verdict.risk, policy) for verdict, policy in zip(at_cut, policies, strict=True) if verdict.risk is not None
        ]
        whole = len(known) == len(policies)
        worst, name = max(known, key=lambda pair: pair[0]) if whole else (None, None)
        risk.append(worst)
        category.append(name)
    every = [verdict for at_cut in verdicts for verdict in at_cut]
    reasons = dict.fromkeys(verdict.reason for verdict in every if verdict.reason)
    masses = [verdict.label_mass for verdict in every if verdict.label_mass is not None]
    return RiskTrace(
        cuts=tuple(cuts),
        risk=tuple(risk),
        reason="; ".join(reasons) or None,
        label_mass=min(masses, default=None),
        category=tuple(category) if len(policies) > 1 else (),
    )
