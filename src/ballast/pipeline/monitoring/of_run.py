"""The monitor of a run, as its configuration asks for it."""

from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from ballast.errors import DataError
from ballast.pipeline.data import Row, draw, load_rows, normalise, suite_prompt

if TYPE_CHECKING:
    from ballast.guardrails.types import Guardrail
    from ballast.pipeline.checkpoints.store import CheckpointStore
    from ballast.pipeline.config import RunConfig
    from ballast.pipeline.context import RunContext
    from ballast.pipeline.evaluation.suites import SuitePrompt
    from ballast.pipeline.generation import Generator
    from ballast.pipeline.monitoring.callback import Event, SafetyMonitor

_SUITE_SEED = 0  # not the run's: runs that differ in their seed alone are monitored on the same prompts
_FEW = 100  # harmful prompts below which a fall of 10 points is easily missed


def monitored(context: "RunContext", trainer: Any, folder: Path, store: "CheckpointStore") -> "SafetyMonitor | None":
    """Let the monitor that the section `monitor` asks for watch a trainer; None where it is off.

    Args:
        context: the run.
        trainer: a trainer that is made, with all its other callbacks.
        folder: the stage's folder; answers and files to review go into `monitor` in it.
        store: where good points are kept.

    Raises:
        DataError: a suite that cannot be used.
    """
    from ballast.pipeline.monitoring.answers import SuiteMeasure
    from ballast.pipeline.monitoring.callback import SafetyMonitor

    config, settings = context.config, context.config.monitor
    if not settings.enabled:
        return None
    suite, judge = monitor_suite(config), monitor_judge(context)
    harmful = sum(prompt.kind == "harmful" for prompt in suite)
    if harmful * settings.samples < _FEW:
        context.say(
            f"  monitor: {harmful} harmful prompts and {settings.samples} answers to each see large falls only; docs/monitoring.md has the figures"
        )
    measure = SuiteMeasure(
        suite,
        context.encode_prompts(suite, config.evaluate.sampling, serving=True),
        judge,
        lambda model: _generator(context, model),
        config.evaluate.sampling,
        settings.samples,
        config.evaluate.threshold,
        config.train.max_unscored_share,
    )
    bounds = ("threshold", "hard_floor", "false_trips", "false_lowerings")
    keys = ("every_n_steps", *bounds, "action", "lr_factor", "cooldown", "max_trips")
    return SafetyMonitor(
        suite,
        judge,
        folder / "monitor",
        **{key: getattr(settings, key) for key in keys},
        measure=measure,
        store=store,
        reward_guard=context.guard,
        # Another name does not make another guard: the configuration has compared what decides.
        allow_same_guard=True,
        on_event=lambda event: _report(context, event),
        seed=config.seed,
    ).watch(trainer)


def monitor_suite(config: "RunConfig") -> list["SuitePrompt"]:
    """The prompts that the monitor measures on, the harmful ones first.

    Raises:
        DataError: no harmful prompt, or one that is trained on.
    """
    settings = config.monitor
    rows = load_rows(settings.suite or config.data.test, "test", config.data)
    trained = {normalise(row.prompt) for row in _trained_on(config)}
    shared = [row.id for row in rows if normalise(row.prompt) in trained]
    if shared:
        raise DataError(
            f"{len(shared)} of {len(rows)} prompts of the monitor's suite are trained on (first: row {shared[0]}), so it would measure "
            "memory; choose other sources for monitor.suite"
        )
    harmful = draw([row for row in rows if row.kind == "harmful"], settings.max_harmful, _SUITE_SEED)
    if not harmful:
        raise DataError(
            "the monitor's suite has no harmful prompt, on which safety is measured; set monitor.suite to sources with some"
        )
    others = draw([row for row in rows if row.kind != "harmful"], settings.max_harmless, _SUITE_SEED)
    return [suite_prompt(row) for row in (*harmful, *others)]


def _trained_on(config: "RunConfig") -> list[Row]:
    """The rows of every stage that changes weights."""
    from ballast.pipeline.safe_updates import safe_update_data

    sft = config.train.method == "sft" and config.sft.rows == "data"
    keys = ["sft.data" if sft else "data.train", *safe_update_data(config)]
    if config.align.enabled:
        keys.append("align.data")
    # Each by itself: what one source may not name twice, two keys may.
    return [row for key in keys for row in load_rows(attrgetter(key)(config), "train", config.data)]


def monitor_judge(context: "RunContext") -> "Guardrail":
    """The guardrail that the monitor measures with; its weights are loaded at its first use.

    Raises:
        ConfigError: it does not exist, or does not take its options.
        GuardError: a plug-in cannot be loaded.
    """
    from ballast.guardrails.registry import load_guardrail

    options = context.config.monitor.judge
    return context.judge if options is None else load_guardrail(options)


def _generator(context: "RunContext", model: Any) -> "Generator":
    """The run's generator with the weights that are being trained: vLLM's where rollouts are vLLM's."""
    from ballast.pipeline.config_inputs import TransformersGeneration
    from ballast.pipeline.generation import TransformersGenerator, VLLMGenerator

    options = context.config.generation
    if isinstance(options, TransformersGeneration):
        return TransformersGenerator(model, context.tokenizer, options.batch_size)
    from ballast.pipeline.training.weight_sync import iterate_policy_weights

    context.engine.load_weights(iterate_policy_weights(model))
    context.forget_weights()
    return VLLMGenerator(context.engine, context.tokenizer)


def _report(context: "RunContext", event: "Event") -> None:
    context.folder.log({"stage": "train", **event})
    match event["event"]:
        case "monitor_baseline":
            context.say(
                f"  monitor: baseline safety {event['figures']['safety']['value']:.3f} ({event['seconds']:.0f} s)"
            )
        case "monitor":
            share = (
                ""
                if event["relative"] is None
                else f", safety {event['safety']:.3f}, {event['relative']:.0%} of the baseline"
            )
            context.say(f"  monitor: step {event['step']}{share}: {escape(event['reason'])} ({event['seconds']:.0f} s)")
        case "monitor_trip":
            context.say(
                f"[yellow]  monitor: tripped at step {event['step']}, action {event['action']}; see monitor/{event['review']}-*.jsonl[/]"
            )
        case "monitor_rollback":
            context.say(f"[yellow]  monitor: back to the weights of step {event['to_step']}[/]")
        case "monitor_lower_lr":
            context.say(f"[yellow]  monitor: learning rate at {event['scale']:.3g} of the configured one[/]")
