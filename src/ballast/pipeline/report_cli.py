"""The command `ballast report`: the report of a run, and several runs beside each other.

Parsed as `ballast.pipeline.cli` parses: nothing heavy is imported before the options are checked.
"""

from pathlib import Path
from typing import Annotated

import typer

from ballast.errors import ConfigError
from ballast.pipeline.stage_group import StageOrCommand

app = typer.Typer(
    cls=StageOrCommand,
    no_args_is_help=True,
    help="Write the report of a run, with a configuration; or compare runs that are there.",
)


@app.command("compare")
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, such as runs/demo; two or more.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page, a new file.")] = Path("compare.html"),
) -> None:
    """Several runs beside each other: outcome, curves, times, and what differs in their configurations."""
    if len(runs) < 2:
        raise ConfigError(f"one run, '{runs[0]}', has nothing to be compared with; name two or more run folders")
    out = out.expanduser()
    if out.exists():
        raise ConfigError(f"--out {out} is there already; choose another name, or delete it")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder '{out.parent}'; make it, or choose another place")

    from rich.console import Console

    from ballast.pipeline.evaluation.tables import render_tables
    from ballast.pipeline.reporting.compare import comparison_page, named, results
    from ballast.pipeline.reporting.run_record import read_run
    from ballast.pipeline.run_folder import write_text

    compared = named([read_run(run.expanduser()) for run in runs])
    write_text(out, comparison_page(compared))
    console = Console()
    console.print(render_tables(results(compared), console.width), highlight=False)
    print(f"written: {out}")
