"""The command `ballast`. Everything is parsed and checked here, before anything heavy is imported.

Exit codes: 0 done; 1 a Ballast error; 2 what the user gave cannot be used; 130 interrupted. An error that
Ballast raises on purpose is shown without its traceback; `BALLAST_TRACEBACK=1` adds it. Any other exception
keeps its traceback: it is a fault of the program. `BALLAST_VERBOSE=1` shows what the libraries say, too.
"""

import os
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import ballast
from ballast.errors import BallastError, ConfigError
from ballast.pipeline import guard_cli, ranks, report_cli, restore_cli, serve_cli
from ballast.pipeline.stage_group import STAGE

if TYPE_CHECKING:
    from ballast.pipeline.launching import Launch

# The stages of `ballast.pipeline.stage_graph`, whose import help does not wait for, with the line that it shows.
STAGES = {
    "baseline": "Measure the start model on the test prompts.",
    "align": "Warm start: LoRA SFT on answers, merged into a model folder.",
    "prompts": "Measure candidate system prompts, and say which to take.",
    "localize": "Find the layers that tell harmful requests from harmless ones.",
    "rollout": "Write completions of the training prompts to a table.",
    "score": "Let the guard score that table, segment by segment.",
    "train": "GRPO with shaped advantages, or shaped SFT.",
    "evaluate": "Measure the tuned model as the start model was measured.",
    "restore": "Try repairs of the tuned model, measure each, and keep the best within limits.",
    "report": "Write the run's tables and figures.",
}


class _Group(TyperGroup):
    """Turns the errors of every command into messages and exit codes."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BallastError as error:
            if not isinstance(error, ranks.MainProcessError):
                _show(error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            print("ballast: interrupted; finished stages are kept, and --resume goes on from them", file=sys.stderr)
            raise typer.Exit(130) from None


def _show(error: BallastError) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    if os.environ.get("BALLAST_TRACEBACK") == "1":
        traceback.print_exc()
    console = Console(stderr=True)
    if console.is_terminal:
        title = "Cannot be used" if error.exit_code == 2 else type(error).__name__
        # Text, not markup: square brackets of a message are meant as they stand.
        console.print(Panel(Text(str(error)), title=title, title_align="left", border_style="red"))
    else:  # in a log a message stays on its lines, so that it can be searched
        print(f"{type(error).__name__}: {error}", file=sys.stderr)


app = typer.Typer(
    cls=_Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Ballast keeps a language model upright while it learns.",
)  # fmt: skip
app.add_typer(guard_cli.app, name="guard")
app.add_typer(restore_cli.app, name="restore")
app.add_typer(report_cli.app, name="report")

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a shipped one: demo, grpo.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values in place of the file's, such as train.steps=10.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the configuration, print all of it as YAML, and stop.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run: finished stages are kept.")]
NoLive = Annotated[bool, typer.Option("--no-live", help="A line a step instead of a table that is drawn anew.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ballast {ballast.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _execute(
    path: str, overrides: list[str] | None, stages: list[str] | None, dry_run: bool, resume: bool, no_live: bool
) -> None:
    from ballast.pipeline.config_loading import config_hash, dump_config, load_config

    config = load_config(path, overrides or [])
    if not dry_run:
        # Before the stages bring in the libraries, which look at their settings once.
        from ballast.pipeline.memory import keep_freed_memory
        from ballast.pipeline.quiet import quiet_libraries

        quiet_libraries()
        keep_freed_memory()
    from ballast.pipeline import run
    from ballast.pipeline.stage_graph import planned

    if dry_run:
        names = stages or planned(config)
        print(f"# {config_hash(config)[:12]}  stages: {' '.join(names)}\n{dump_config(config)}", end="")
    else:
        run.run(config, stages=stages, resume=resume, live=not no_live)


@app.command("demo")
def demo(overrides: Overrides = None, dry_run: DryRun = False, resume: Resume = False, no_live: NoLive = False) -> None:
    """The main job on the embedded model and guard: about 12 minutes on two CPU cores."""
    _execute("demo", overrides, None, dry_run, resume, no_live)


@app.command("run")
def run_all(
    config: Config,
    overrides: Overrides = None,
    stage: Annotated[
        list[str] | None,
        typer.Option("--stage", metavar="NAME", help=f"Only this one, or these: {', '.join(STAGES)}."),
    ] = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    no_live: NoLive = False,
    launch: Annotated[
        str | None,
        typer.Option(
            "--launch",
            metavar="FILE",
            help="Train in several processes, as a file of `accelerate config` says, or a shipped one: ddp, fsdp2, zero2, zero3.",
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", min=1, help="How many, in place of the launch file's number.")
    ] = None,
) -> None:
    """All stages of a configuration; those that are done are not done again."""
    for name in stage or []:
        if name not in STAGES:
            raise ConfigError(f"--stage {name}: there is no such stage; choose one of {', '.join(STAGES)}")
    if processes is not None and launch is None:
        raise ConfigError("--processes counts the processes of a launch; name one by --launch, such as --launch ddp")
    if launch is not None:
        from ballast.pipeline.launching import read_launch

        asked = read_launch(launch, processes)
        if asked.processes > 1:
            _launch(config, overrides or [], stage, asked, dry_run, resume, no_live)
            return
    _execute(config, overrides, stage or None, dry_run, resume, no_live)


def _launch(
    path: str,
    overrides: list[str],
    stages: list[str] | None,
    launch: "Launch",
    dry_run: bool,
    resume: bool,
    no_live: bool,
) -> None:
    from ballast.pipeline import launch_run
    from ballast.pipeline.config_loading import load_config
    from ballast.pipeline.launching import check_launch
    from ballast.pipeline.run import check_run
    from ballast.pipeline.stage_graph import planned

    config = load_config(path, overrides)
    names = stages or planned(config)
    check_launch(config, names, launch)
    if dry_run:
        _execute(path, overrides, stages, True, resume, no_live)
        return
    check_run(config, names, resume)
    todo = launch_run.commands(path, overrides, names, launch, resume=resume, live=not no_live)
    if code := launch_run.run_commands(todo):
        raise typer.Exit(code)


def _stage_command(name: str) -> Callable[..., None]:
    def command(
        config: Config,
        overrides: Overrides = None,
        dry_run: DryRun = False,
        resume: Resume = False,
        no_live: NoLive = False,
    ) -> None:
        _execute(config, overrides, [name], dry_run, resume, no_live)

    return command


# Stages with commands of their own beside them.
_GROUPS = {"restore": restore_cli.app, "report": report_cli.app}

for _name, _help in STAGES.items():
    if _name in _GROUPS:
        _GROUPS[_name].command(STAGE, help=_help)(_stage_command(_name))
    else:
        app.command(_name, help=_help, rich_help_panel="One stage alone")(_stage_command(_name))


app.command("serve")(serve_cli.serve)


@app.command("doctor")
def doctor() -> None:
    """What this machine can run, and what is missing."""
    from ballast.pipeline.doctor import examine, show

    checks = examine()
    show(checks)
    raise typer.Exit(1 if any(check.state == "missing" for check in checks) else 0)


def main() -> None:
    """Entry point of the command `ballast`."""
    app()


if __name__ == "__main__":
    main()
