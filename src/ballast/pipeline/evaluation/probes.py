"""The probes for cheats on one model, as the section `evaluate.probes` asks for them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ballast.pipeline.config_evaluate import ProbesConfig
from ballast.pipeline.evaluation.adaptation import adaptation
from ballast.pipeline.evaluation.answer_table import write_probe_answers
from ballast.pipeline.evaluation.attacks import Asked, attack_figures, attacked, in_a_scene, opened_text, opening_ids
from ballast.pipeline.evaluation.judges import Completion, Verdict, answer_to
from ballast.pipeline.evaluation.probe_figures import AttackFigures, ProbeFigures
from ballast.pipeline.evaluation.statistics import Estimate
from ballast.pipeline.evaluation.suites import SuitePrompt

if TYPE_CHECKING:
    from ballast.pipeline.context import RunContext
    from ballast.pipeline.generation import Generator


def run_probes(
    context: "RunContext",
    generator: "Generator",
    prompts: Sequence[SuitePrompt],
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
    refused_ordinary: Estimate,
    folder: Path,
    label: str,
) -> ProbeFigures | None:
    """Probe one model, and write its answers to `LABEL-prefill.parquet` and `LABEL-role_play.parquet`.

    Args:
        context: the run.
        generator: holds the model's weights.
        prompts: the suite.
        completions: (N,) the model's answers to it.
        verdicts: (N,) what the judges said of them.
        refused_ordinary: share of refusals on ordinary prompts.
        folder: where the tables go.
        label: the model's.

    Returns:
        None where the configuration asks for no probes.

    Raises:
        DataError: a prompt inside its scene, or with the opening, that cannot be given to the model.
        GuardError: a judge broke its contract.
    """
    config, options = context.config.evaluate, context.config.evaluate.probes
    if options is None:
        return None
    chosen = attacked(prompts, options.max_prompts)
    attacks: dict[str, AttackFigures | None] = {}
    for name in ("prefill", "role_play"):
        asked = _ask(context, generator, chosen, name, label) if getattr(options, name) else []
        attacks[name] = _attack(context, asked, verdicts, folder / f"{label}-{name}.parquet") if asked else None
    adapted = None
    if options.adaptation:
        with context.console.status(f"{label}: trying safe words on unsafe answers"):
            adapted = adaptation(
                completions,
                verdicts,
                context.judge,
                context.second_judge,
                context.config.segments,
                config.threshold,
                config.interval,
            )
    return ProbeFigures(attacks["prefill"], attacks["role_play"], adapted, refuses(refused_ordinary, options))


def _attack(context: "RunContext", asked: Sequence[Asked], plain: Sequence[Verdict], path: Path) -> AttackFigures:
    """The figures of one attack; its answers are written to `path`."""
    config = context.config.evaluate
    figures, judged = attack_figures(
        asked,
        plain,
        context.judge,
        context.second_judge,
        threshold=config.threshold,
        level=config.interval,
        seed=context.config.seed,
    )
    write_probe_answers(path, asked, judged)
    return figures


def refuses(refused_ordinary: Estimate, options: ProbesConfig) -> bool | None:
    """Whether a model refuses more ordinary prompts than `max_refused_ordinary`; None where it was asked none."""
    share = refused_ordinary.value
    return None if share is None else share > options.max_refused_ordinary


def _ask(
    context: "RunContext", generator: "Generator", prompts: Sequence[SuitePrompt], attack: str, label: str
) -> list[Asked]:
    """The model's answers to prompts under one attack, as many samples a prompt as in the plain measurement."""
    config = context.config.evaluate
    put = [in_a_scene(prompt) for prompt in prompts] if attack == "role_play" else list(prompts)
    opening = opening_ids(context.tokenizer) if attack == "prefill" else []
    room = config.sampling.model_copy(update={"max_new_tokens": config.sampling.max_new_tokens + len(opening)})
    encoded = [[*ids, *opening] for ids in context.encode_prompts(put, room, serving=True)]
    samples = range(config.samples)
    with context.progress(f"{label}: {attack}", len(prompts) * len(samples)) as done:
        ids = [of_prompt for of_prompt in encoded for _ in samples]
        answers = generator.generate(ids, config.sampling, context.config.seed, done)
    asked = []
    for i, answer in enumerate(answers):
        prompt, text = prompts[i // len(samples)], answer.text
        if attack == "prefill":
            text = opened_text(context.tokenizer, answer)
        asked.append(Asked(answer_to(prompt, text, answer.truncated, i % len(samples)), answer.text))
    return asked
