"""The command `ballast guard`: which guards there are, whether one keeps the contract, what one says of a file, and
how far its risk can be taken at its word.

Parsed as `ballast.pipeline.cli` parses: nothing heavy is imported before the guard itself is loaded.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ballast.errors import ConfigError

if TYPE_CHECKING:
    from ballast.guardrails.licences import Licence
    from ballast.guardrails.reliability import Interval
    from ballast.pipeline.guard_calibrate import Calibrated

app = typer.Typer(
    no_args_is_help=True,
    help="The guardrails: which there are, whether one keeps the contract, what one says of a data set, calibration.",
)

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="An option of the guard, such as batch_size=4; may be repeated."),
]
ConfigFile = Annotated[
    str | None,
    typer.Option(
        "--config", metavar="FILE", help="YAML with the guard's options; of a run's configuration, its `guard`."
    ),
]


@app.command("list")
def list_guards(
    models: Annotated[bool, typer.Option("--models", help="The licences of known guard models as well.")] = False,
) -> None:
    """Guards that can stand in `guard` and `judge`, built in or brought by a package, with their licences."""
    from ballast.guardrails.licences import MODELS
    from ballast.guardrails.registry import describe_guards

    entries = describe_guards()
    _columns(
        ("NAME", "PACKAGE", "LICENCE", "AS A REWARD", "WHAT"),
        [(e.name, e.package, e.licence.name, e.licence.as_reward, e.what) for e in entries],
    )
    if models:
        print()
        _columns(
            ("MODEL BEGINS WITH", "LICENCE", "AS A REWARD", "NOTE"),
            [(name, licence.name, licence.as_reward, licence.note) for name, licence in sorted(MODELS.items())],
        )
    print(
        "\nIn a configuration: guard.type=NAME; a package's own: guard.type=plugin guard.name=NAME."
        "\n`As a reward` says whether its outputs may train another model."
        + ("" if models else " Licences by model: --models.")
    )


@app.command("check")
def check(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A name of `ballast guard list`; --config can stand for it.")
    ] = None,
    settings: Settings = None,
    config: ConfigFile = None,
    tolerance: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Largest difference of two risks that counts as equal.")
    ] = 0.02,
) -> None:
    """Send ordinary and awkward exchanges through a guard: does it keep the contract? Exit code 1 if not."""
    from ballast.guardrails.contract import check_guardrail
    from ballast.guardrails.registry import guard_options, licence_of, load_guardrail
    from ballast.pipeline.quiet import quiet_libraries

    options = guard_options(guard_settings(name, settings or (), config))
    quiet_libraries()
    report = check_guardrail(
        load_guardrail(options), tolerance=tolerance, on_held=lambda rule: print(f"ok  {rule}", flush=True)
    )
    for what, reason in report.unscored.items():
        print(f"unscored  {what}: {reason}")
    for note in report.notes:
        print(f"note  {note}")
    print(f"licence  {_licence(licence_of(options))}")
    mass = "" if report.label_mass is None else f", label mass {report.label_mass:.3f} or more"
    print(
        f"guardrail '{report.name}' keeps the contract ({report.seconds:.1f} s, of which {report.call_seconds:.3f} s for an "
        f"ordinary batch{mass}; equal calls differ by {report.max_difference:.4f} at most)"
    )


@app.command("score")
def score(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="JSON lines with prompt (or messages) and response; - for stdin.")
    ],
    guard: Annotated[
        str | None,
        typer.Option("--guard", metavar="NAME", help="A name of `ballast guard list`; embedded if not given."),
    ] = None,
    settings: Settings = None,
    config: ConfigFile = None,
    cuts: Annotated[
        str, typer.Option(help="Where responses are judged: end, words:5, sentences:1; the highest risk counts.")
    ] = "end",
    out: Annotated[
        str | None, typer.Option(metavar="FILE", help="Where the risks go: .jsonl or .parquet; else to stdout.")
    ] = None,
    report: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Audit the data set: this .json, a .md beside it, and the terminal."),
    ] = None,
    threshold: Annotated[float, typer.Option(min=0.0, max=1.0, help="Risk from which a row counts as risky.")] = 0.5,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows handed to the guard at a time.")] = 32,
    prompt_column: Annotated[str, typer.Option(help="Column of the prompt: text, or a list of messages.")] = "prompt",
    messages_column: Annotated[str, typer.Option(help="Column of a list of messages; before the prompt.")] = "messages",
    response_column: Annotated[
        str, typer.Option(help="Column of the response; else the last assistant turn.")
    ] = "response",
    id_column: Annotated[
        str | None, typer.Option(help="Column of the row's name; `id` or the line if not given.")
    ] = None,
    category_column: Annotated[
        str | None, typer.Option(help="Column to group the audit by; `category` if not given.")
    ] = None,
) -> None:
    """Judge every row of a file; with --report, audit it before training on it. Interrupted, it goes on from --out."""
    from ballast.guardrails.registry import guard_options
    from ballast.pipeline.guard_job import Job, run_job
    from ballast.pipeline.guard_rows import Columns

    run_job(
        Job(
            file=file,
            options=guard_options(guard_settings(guard or (None if config else "embedded"), settings or (), config)),
            cuts=cuts,
            columns=Columns(prompt_column, messages_column, response_column, id_column, category_column),
            out=out,
            report=report,
            threshold=threshold,
            batch_size=batch_size,
        )
    )


@app.command("calibrate")
def calibrate(
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="JSON lines with prompt (or messages), response and label; - for stdin."),
    ],
    out: Annotated[
        str, typer.Option(metavar="FILE", help="The calibration, a new .json; its report goes to .report.json beside.")
    ],
    guard: Annotated[
        str | None,
        typer.Option("--guard", metavar="NAME", help="A name of `ballast guard list`; embedded if not given."),
    ] = None,
    settings: Settings = None,
    config: ConfigFile = None,
    method: Annotated[
        Literal["temperature", "isotonic"],
        typer.Option(help="temperature keeps gradations; isotonic follows the labels closer."),
    ] = "temperature",
    benign: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Ordinary text, without labels: safe rows, the floor is chosen on them."),
    ] = None,
    benign_quantile: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of benign rows, below 1, that get a risk of exactly 0.")
    ] = 0.9,
    no_floor: Annotated[bool, typer.Option("--no-floor", help="Leave the risk of benign rows as it is.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows handed to the guard at a time.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of the split by prompt, and of the intervals.")] = 0,
    label_column: Annotated[str, typer.Option(help="Column of the label: true or 1 is unsafe.")] = "unsafe",
    prompt_column: Annotated[str, typer.Option(help="Column of the prompt: text, or a list of messages.")] = "prompt",
    messages_column: Annotated[str, typer.Option(help="Column of a list of messages; before the prompt.")] = "messages",
    response_column: Annotated[
        str, typer.Option(help="Column of the response; else the last assistant turn.")
    ] = "response",
) -> None:
    """Fit a calibration of a guard's risk on labelled rows, for `guard.type=calibrated`; measure it on other prompts."""
    from ballast.guardrails.registry import guard_options
    from ballast.pipeline.guard_calibrate import CalibrateJob, run_calibration
    from ballast.pipeline.guard_rows import Columns

    done = run_calibration(
        CalibrateJob(
            file=file,
            options=guard_options(guard_settings(guard or (None if config else "embedded"), settings or (), config)),
            columns=Columns(prompt_column, messages_column, response_column, label=label_column),
            method=method,
            benign=benign,
            benign_quantile=None if no_floor else benign_quantile,
            out=out,
            batch_size=batch_size,
            seed=seed,
        )
    )
    _show_calibration(done)


def guard_settings(name: str | None, assignments: Sequence[str], config: str | None) -> dict[str, Any]:
    """A guard's options from the command line, not validated yet.

    Args:
        name: type of a built-in guard, or name of a plug-in; `guard` or `judge` picks that part of a run's
            configuration; None leaves it to `config`.
        assignments: `key=value`, dotted for nested options, over what the file says.
        config: YAML file with the options, or a run's configuration, whose `guard` is taken.

    Returns:
        A mapping with the key `type`.

    Raises:
        ConfigError: no guard is named, the file cannot be read or names another guard, or an assignment has no `=`.
    """
    from ballast.guardrails.registry import OPTIONS, plugin_names
    from ballast.pipeline.config_loading import apply_overrides, read_mapping, split_overrides
    from ballast.pipeline.config_problems import report

    options: dict[str, Any] = {}
    if config is not None:
        _, options = read_mapping(config)
        part = name if name in ("guard", "judge") else "guard"
        if "type" not in options and isinstance(options.get(part), dict):
            options, name = options[part], None if name == part else name
    if name is not None:
        is_plugin = name not in OPTIONS and name in plugin_names()
        named = {"type": "plugin", "name": name} if is_plugin else {"type": name}
        if any(options.get(key, value) != value for key, value in named.items()):
            raise ConfigError(
                f"the command names the guard '{name}' and '{config}' the guard '{options.get('name', options['type'])}'; "
                "leave NAME out, or the file"
            )
        options = {**options, **named}
    if "type" not in options:
        where = f"'{config}' has neither 'type' nor 'guard'" if config else "no guard is named"
        raise ConfigError(f"{where}; give a name of `ballast guard list`, or a file with the key 'type'")
    # A plug-in's own options lie one level deeper.
    target = options.setdefault("options", {}) if options["type"] == "plugin" else options
    split, problems = split_overrides(assignments)
    problems += apply_overrides(target, split)
    if problems:
        raise ConfigError(report("--set", problems))
    return options


def _licence(licence: "Licence") -> str:
    said = {
        "yes": "may be used as a reward",
        "no": "must not be used as a reward",
        "conditions": "may be used as a reward on a condition",
        "unknown": "whether it may be used as a reward is unknown",
    }[licence.as_reward]
    return f"{licence.name}: {said}" + (f" ({licence.note})" if licence.note else "")


def _show_calibration(done: "Calibrated") -> None:
    fitted, report = done.calibration, done.report
    shape = f"temperature {fitted.temperature:.3g}" if fitted.temperature else f"isotonic, {len(fitted.knots)} knots"
    print(f"guardrail '{fitted.guard}': {shape}, benign floor {fitted.benign_floor:.3g}")
    print(
        f"{report.fitted_rows} rows fitted, {report.held_out_rows} rows of other prompts measured, {report.unscored} unscored\n"
    )

    def shown(figure: "Interval") -> str:
        ends = "no interval" if figure.low is None else f"{figure.low:.3f} to {figure.high:.3f}"
        return f"{figure.value:.3f} ({ends})"

    figures = (("ECE", "ece", "0 is best"), ("Brier", "brier", "0 is best"), ("AUROC", "auroc", "1 is best"))
    _columns(
        ("FIGURE", "BEFORE", "AFTER", ""),
        [(name, shown(getattr(report.before, f)), shown(getattr(report.after, f)), best) for name, f, best in figures],
    )
    benign = "no benign row" if report.benign_at_zero is None else f"{report.benign_at_zero:.1%} of the benign rows"
    print(f"\nrisk 0 after: {benign}, {report.unsafe_at_zero:.1%} of the unsafe rows (95% intervals resample prompts)")
    print(f"written: {done.files[0]}, {done.files[1]}")


def _columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Lines of aligned cells: whole in a file or a pipe, where a table of rich would be cut to 80 columns."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head) - 1)] + [0]
    for line in lines:
        print("  ".join(f"{cell.ljust(width)}" for cell, width in zip(line, widths, strict=True)).rstrip())
