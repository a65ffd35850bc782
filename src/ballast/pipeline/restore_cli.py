"""The command `ballast restore`: give a tuned model its safety back from the models it came from, without training.

Parsed as `ballast.pipeline.cli` parses: nothing heavy is imported before the options are checked.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ballast.pipeline.basin_cli import restore_basin
from ballast.pipeline.stage_group import StageOrCommand

if TYPE_CHECKING:
    from ballast.pipeline.restoration.methods import Method
    from ballast.pipeline.restoration.models import Models
    from ballast.pipeline.restoration.restore import Restored

app = typer.Typer(
    cls=StageOrCommand,
    no_args_is_help=True,
    help="Repair a tuned model by arithmetic on its weights: a method below directly, or with a configuration in its place "
    "the stage that tries several.",
)

app.command("basin")(restore_basin)

Base = Annotated[
    str, typer.Option(metavar="MODEL", help="From before the alignment: a folder, a hub id, embedded:smollm2-135m.")
]
Aligned = Annotated[str, typer.Option(metavar="MODEL", help="The safe one, or a LoRA folder over the base.")]
Tuned = Annotated[str, typer.Option(metavar="MODEL", help="The one to repair, or a LoRA folder over one of the two.")]
Out = Annotated[str, typer.Option(metavar="FOLDER", help="Where the result goes, an ordinary model folder: a new one.")]
Modules = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Names of tensors, such as '*.mlp.*'; may be repeated."),
]
Device = Annotated[str, typer.Option(help="Where it is computed: cpu, cuda, cuda:1.")]
ShardGb = Annotated[float, typer.Option(min=0.001, help="Largest size of a weight file, in GB.")]
TunedOver = Annotated[
    Literal["base", "aligned"] | None,
    typer.Option(help="Which model a LoRA was trained on, where its own record names a folder that was moved."),
]
AlignedOver = Annotated[Literal["base"] | None, typer.Option(help="The same, for the aligned model.")]


@app.command("lox")
def restore_lox(
    base: Base,
    aligned: Aligned,
    out: Out,
    tuned: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The one to repair; without it the aligned one is hardened.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Singular directions of the alignment to extrapolate.")] = 6,
    alpha: Annotated[float, typer.Option(min=0.0, help="By how much; 0 changes nothing.")] = 1.25,
    svd: Annotated[
        Literal["auto", "exact", "randomised"], typer.Option(help="auto is exact up to a side of 512.")
    ] = "auto",
    lora_rank: Annotated[
        int | None,
        typer.Option(min=1, help="Write a LoRA of this rank: exact for LoRA models from their rank plus --rank on."),
    ] = None,
    modules: Modules = None,
    device: Device = "cpu",
    shard_gb: ShardGb = 5.0,
    tuned_over: TunedOver = None,
    aligned_over: AlignedOver = None,
) -> None:
    """LoX: W + alpha times the leading directions of (aligned - base). Default modules: the matrices of all layers."""
    from ballast.pipeline.restoration.lox import Lox
    from ballast.pipeline.restoration.methods import LAYERS

    method = Lox(rank, alpha, tuple(modules or LAYERS), svd)
    over: dict[str, str | None] = {"tuned": tuned_over, "aligned": aligned_over}
    _restore(method, base, aligned, tuned, out, device, shard_gb, over, lora_rank)


@app.command("safe-lora")
def restore_safe_lora(
    base: Base,
    aligned: Aligned,
    tuned: Tuned,
    out: Out,
    tau: Annotated[
        float, typer.Option(min=-1.0, max=1.0, help="Project matrices whose cosine is below; -1 changes nothing.")
    ] = 0.35,
    modules: Modules = None,
    device: Device = "cpu",
    shard_gb: ShardGb = 5.0,
    tuned_over: TunedOver = None,
    aligned_over: AlignedOver = None,
) -> None:
    """Safe LoRA: project (tuned - aligned) onto (aligned - base). Default modules: the matrices of all layers."""
    from ballast.pipeline.restoration.methods import LAYERS
    from ballast.pipeline.restoration.safe_lora import SafeLora

    method = SafeLora(tau, tuple(modules or LAYERS))
    _restore(method, base, aligned, tuned, out, device, shard_gb, {"tuned": tuned_over, "aligned": aligned_over})


@app.command("resta")
def restore_resta(
    base: Base,
    aligned: Aligned,
    tuned: Tuned,
    out: Out,
    gamma: Annotated[float, typer.Option(min=0.0, help="By how much; 0 changes nothing.")] = 0.5,
    modules: Modules = None,
    device: Device = "cpu",
    shard_gb: ShardGb = 5.0,
    tuned_over: TunedOver = None,
    aligned_over: AlignedOver = None,
) -> None:
    """RESTA, task arithmetic: W + gamma (aligned - base). Default modules: every tensor."""
    from ballast.pipeline.restoration.task_arithmetic import Resta

    method = Resta(gamma, tuple(modules or ("*",)))
    _restore(method, base, aligned, tuned, out, device, shard_gb, {"tuned": tuned_over, "aligned": aligned_over})


@app.command("nlsr")
def restore_nlsr(
    base: Base,
    aligned: Aligned,
    tuned: Tuned,
    out: Out,
    calibration: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE", help="Harmful requests with safe answers, as in data.train; may be repeated."),
    ] = None,
    max_rows: Annotated[int, typer.Option(min=1, help="Calibration rows that are read.")] = 128,
    system_prompt: Annotated[str | None, typer.Option(help="System prompt that the aligned model has.")] = None,
    beta: Annotated[float, typer.Option(min=0.0, help="How far the reference lies beyond the aligned model.")] = 0.9,
    sparsity: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of entries that are left alone.")] = 0.8,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank of the alignment, if it was a LoRA that has been merged.")
    ] = None,
    share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of layers that are patched.")] = 0.5,
    choice: Annotated[
        Literal["rank", "sample"], typer.Option(help="The least similar layers, or the paper's draw.")
    ] = "rank",
    spread: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Of the draw: share - spread to share + spread.")
    ] = 0.2,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    unit: Annotated[
        Literal["module", "layer"], typer.Option(help="What a layer is: a linear module, or a decoder layer.")
    ] = "module",
    strength: Annotated[float, typer.Option(min=0.0, max=1.0, help="1 replaces the entries, 0 changes nothing.")] = 1.0,
    lora_rank: Annotated[int | None, typer.Option(min=1, help="Write a LoRA of this rank instead of a model.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Calibration rows a forward.")] = 8,
    modules: Modules = None,
    device: Device = "cpu",
    shard_gb: ShardGb = 5.0,
    tuned_over: TunedOver = None,
    aligned_over: AlignedOver = None,
) -> None:
    """NLSR: give safety neurons of the least similar layers the values of a super-aligned reference; runs the model."""
    from ballast.pipeline.restoration.methods import LAYERS
    from ballast.pipeline.restoration.nlsr.settings import NLSRSettings

    settings = NLSRSettings(
        beta, sparsity, rank, share, choice, spread, seed, unit, strength, modules=tuple(modules or LAYERS)
    )
    models = _open(base, aligned, tuned, device, {"tuned": tuned_over, "aligned": aligned_over})

    from ballast.pipeline.restoration.nlsr.calibration import read_calibration
    from ballast.pipeline.restoration.nlsr.realign import realignment
    from ballast.pipeline.restoration.output import check_output

    folder = Path(out).expanduser()
    check_output(folder, [weights.folder for weights in models.each()])  # before minutes of forwards
    rows = read_calibration(models.aligned, calibration or ["shipped:harmful"], system_prompt, max_rows)
    with _progress() as show:
        method = realignment(models, rows, settings, device, batch_size, on_module=show)
    _show(_write(method, models, folder, device, shard_gb, lora_rank))


def _restore(
    method: "Method",
    base: str,
    aligned: str,
    tuned: str | None,
    out: str,
    device: str,
    shard_gb: float,
    over: dict[str, str | None],
    lora_rank: int | None = None,
) -> None:
    models = _open(base, aligned, tuned, device, over)
    _show(_write(method, models, Path(out).expanduser(), device, shard_gb, lora_rank))


def _write(
    method: "Method", models: "Models", folder: Path, device: str, shard_gb: float, lora_rank: int | None
) -> "Restored":
    from ballast.pipeline.restoration.nlsr.lora import restore_as_lora
    from ballast.pipeline.restoration.restore import restore

    with _progress() as show:
        if lora_rank is None:
            return restore(method, models, folder, device, int(shard_gb * 1e9), show)
        return restore_as_lora(method, models, folder, lora_rank, device, show)


def _open(base: str, aligned: str, tuned: str | None, device: str, over: dict[str, str | None]) -> "Models":
    from ballast.pipeline.quiet import quiet_libraries
    from ballast.pipeline.restoration.models import open_models
    from ballast.pipeline.restoration.restore import check_device

    quiet_libraries()
    check_device(device)
    return open_models(base, aligned, tuned, {label: of for label, of in over.items() if of is not None})


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar, gone at the end; the block gets what is told a tensor's name, how many are done and how many there are."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # A live display writes blank lines into a log file.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)

        def show(name: str, done: int, total: int) -> None:
            bar.update(task, description=name, completed=done, total=total)

        yield show


def _show(restored: "Restored") -> None:
    from rich.console import Console
    from rich.table import Table

    rows = _by_module(restored)
    figures = sorted({key for row in rows.values() for key in row["figures"]})
    table = Table("matrices", "changed", "kept", *(f"mean {key}" for key in figures), title=restored.method)
    for module, row in sorted(rows.items()):
        means = (
            sum(row["figures"][key]) / len(row["figures"][key]) if key in row["figures"] else None for key in figures
        )
        table.add_row(module, str(row["changed"]), str(row["kept"]), *("" if m is None else f"{m:.3g}" for m in means))
    Console().print(table)
    for note in restored.notes:
        print(f"note: {note}")
    print(f"{len(restored.changed)} tensors changed, {len(restored.kept) + restored.unselected} left as they were")
    print(f"written: {restored.folder}")


def _by_module(restored: "Restored") -> dict[str, dict[str, Any]]:
    """What was done, over all layers: `self_attn.q_proj.weight` of each layer is one line."""
    rows: dict[str, dict[str, Any]] = {}
    for state in ("changed", "kept"):
        for name, figures in getattr(restored, state).items():
            parts = name.split(".")
            layer = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
            row = rows.setdefault(".".join(parts[layer + 1 :]), {"changed": 0, "kept": 0, "figures": {}})
            row[state] += 1
            for key, value in figures.items():
                row["figures"].setdefault(key, []).append(value)
    return rows
