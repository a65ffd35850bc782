"""The command `ballast`. Everything is parsed and checked here, before anything heavy is imported.

Exit codes: 0 done; 1 a Ballast error; 2 what the user gave cannot be used; 130 interrupted. An error that
Ballast raises on purpose is shown without its traceback; `BALLAST_TRACEBACK=1` adds it. Any other exception
keeps its traceback: it is a fault of the program. `BALLAST_VERBOSE=1` shows what the libraries say, too.
"""

import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import ballast
from ballast.errors import BallastError, ConfigError
from ballast.pipeline import guard_cli, restore_cli, serve_cli

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
        str | None, typer.Option("--stage", metavar="NAME", help=f"Only this one: {', '.join(STAGES)}.")
    ] = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    no_live: NoLive = False,
) -> None:
    """All stages of a configuration; those that are done are not done again."""
    if stage is not None and stage not in STAGES:
        raise ConfigError(f"--stage {stage}: there is no such stage; choose one of {', '.join(STAGES)}")
    _execute(config, overrides, [stage] if stage else None, dry_run, resume, no_live)


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


for _name, _help in STAGES.items():
    if _name != "restore":
        app.command(_name, help=_help, rich_help_panel="One stage alone")(_stage_command(_name))
restore_cli.app.command(restore_cli.STAGE, help=STAGES["restore"])(_stage_command("restore"))


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
