"""The command `ballast restore basin`: how far a model's weights can be pushed at random before it stops being safe."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ballast.errors import ConfigError, DataError

if TYPE_CHECKING:
    from ballast.pipeline.restoration.basin import Basin, Figure
    from ballast.pipeline.restoration.basin_measure import BasinMeasure


def restore_basin(
    model: Annotated[str, typer.Option(metavar="MODEL", help="A folder, a hub id, embedded:smollm2-135m.")],
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Where basin.json and basin.svg go.")],
    data: Annotated[
        list[str] | None, typer.Option(metavar="SOURCE", help="Harmful requests, as in data.test; may be repeated.")
    ] = None,
    max_prompts: Annotated[int, typer.Option(min=1, help="Requests that are asked at each point.")] = 40,
    system_prompt: Annotated[str | None, typer.Option(help="System prompt that the model has.")] = None,
    directions: Annotated[int, typer.Option(min=1, help="Random directions.")] = 1,
    reach: Annotated[float, typer.Option(help="Largest distance, in multiples of each matrix's norm.")] = 0.5,
    points: Annotated[int, typer.Option(min=3, help="Points of a direction, an odd number.")] = 21,
    seed: Annotated[int, typer.Option(help="Of the directions.")] = 0,
    vectors: Annotated[bool, typer.Option("--vectors", help="Move biases and gains of norms, too.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 32,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers at a time.")] = 16,
    guard: Annotated[str, typer.Option(metavar="NAME", help="The judge, a name of `ballast guard list`.")] = "embedded",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the judge; may be repeated.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
) -> None:
    """Safety basin: answers of the model with its weights moved at random, and VISAGE; a diagnostic, nothing is changed."""
    from ballast.guardrails.registry import guard_options
    from ballast.pipeline.guard_cli import guard_settings
    from ballast.pipeline.quiet import quiet_libraries

    options = guard_options(guard_settings(guard, settings or (), None))
    if dtype not in ("bfloat16", "float32"):
        raise ConfigError(f"--dtype {dtype}: choose bfloat16 or float32")
    quiet_libraries()

    from rich.console import Console
    from rich.progress import Progress

    from ballast.models import resolve_model
    from ballast.pipeline.context import load_policy
    from ballast.pipeline.restoration.basin import safety_basin

    folder = resolve_model(model)
    sources = data or ["shipped:harmful"]
    measure = _measure(folder, sources, max_prompts, system_prompt, options, max_new_tokens, batch_size)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("measuring", total=directions * (points - 1) + 1)
        policy = load_policy(folder, dtype)
        basin = safety_basin(policy, measure, directions, reach, points, seed, vectors, lambda n: bar.advance(task, n))
    record = {"model": model, "prompts": len(measure.rows), "seed": seed, "vectors": vectors, "judge": guard}
    _write(basin, Path(out).expanduser(), record)
    _print(basin)
    print(f"written: {Path(out) / 'basin.json'}, {Path(out) / 'basin.svg'}")


def _measure(
    folder: str,
    sources: Sequence[str],
    max_prompts: int,
    system_prompt: str | None,
    judge: Any,
    max_new_tokens: int,
    batch_size: int,
) -> "BasinMeasure":
    from transformers import AutoTokenizer

    from ballast.guardrails.registry import load_guardrail
    from ballast.pipeline.config_inputs import DataConfig
    from ballast.pipeline.data import load_rows
    from ballast.pipeline.model_record import check_record
    from ballast.pipeline.prompting import PromptFormat
    from ballast.pipeline.restoration.basin_measure import BasinMeasure

    rows = [row for row in load_rows(sources, "test", DataConfig()) if row.kind == "harmful"][:max_prompts]
    if not rows:
        raise DataError("none of the rows of --data is a harmful request; a safety basin is measured on those")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt_format = PromptFormat(tokenizer, system_prompt)
    check_record(Path(folder), prompt_format)
    ids = [prompt_format.encode_request(row.id, row.prompt) for row in rows]
    return BasinMeasure(rows, ids, tokenizer, load_guardrail(judge), max_new_tokens, batch_size)


def _write(basin: "Basin", folder: Path, record: dict[str, Any]) -> None:
    from ballast.pipeline.restoration.basin_figure import basin_figure

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**record, **basin.to_json()}, indent=1)
    (folder / "basin.json").write_text(text + "\n", encoding="utf-8")
    title = f"Safety basin of {Path(record['model']).name}"
    (folder / "basin.svg").write_text(basin_figure(basin, title), encoding="utf-8")


def _print(basin: "Basin") -> None:
    print("distance  no refusal  unsafe  readable")
    shares = (basin.mean("complied"), basin.mean("unsafe"), basin.mean("coherent"))
    for t, complied, unsafe, coherent in zip(basin.distances, *shares, strict=True):
        print(f"{t:8.3f}  {_share(complied):>10}  {_share(unsafe):>6}  {_share(coherent):>8}")
    figures: tuple[tuple[Figure, str], ...] = (("complied", "no refusal"), ("unsafe", "unsafe"))
    for figure, label in figures:
        every, readable = basin.visage(figure), basin.visage(figure, readable_only=True)
        print(f"VISAGE by {label}: {_share(every)}; at points with readable answers: {_share(readable)}")


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
