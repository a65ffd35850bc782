"""What `ballast serve RUN_OR_MODEL` means: which weights, under which contract, with whose settings."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ballast.errors import ConfigError, ModelError
from ballast.models import resolve_model
from ballast.pipeline.config_base import Component
from ballast.pipeline.config_serve import ServeConfig
from ballast.pipeline.model_record import check_contract, check_record
from ballast.pipeline.prompting import PromptFormat
from ballast.pipeline.serving.contract import served_format

_ADAPTER = Path("train") / "adapter"
# In a run the first of these that is there: what was repaired, trained, warmed up.
_MODELS = (Path("restore") / "model", Path("train") / "model", Path("align") / "model")


@dataclass(frozen=True)
class Target:
    """What is served.

    Attributes:
        name: for clients.
        model: folder of the weights.
        adapter: folder of a LoRA over them; None for none.
        lora_rank: its rank.
        dtype: precision, as vLLM takes it.
        prompt_format: of training; `serving()` is what is served.
        settings: the section `serve`.
        guard: options of the guardrail; None where none is named.
    """

    name: str
    model: Path
    adapter: Path | None
    lora_rank: int
    dtype: str
    prompt_format: PromptFormat
    settings: ServeConfig
    guard: BaseModel | None


class _Settings(Component):
    serve: ServeConfig = ServeConfig()


def open_target(
    what: str,
    overrides: Sequence[str] = (),
    *,
    adapter: bool = False,
    adopt: bool = False,
    system_prompt: str | None = None,
) -> Target:
    """Find what is served, and check that it still is what was trained.

    Args:
        what: a run folder, a model folder, a hub id, or the embedded model's alias.
        overrides: `serve.port=8000` and the like; of a run any key of its configuration.
        adapter: of a run, serve the adapter over the model it was trained on, instead of the merged weights.
        adopt: see `served_format`.
        system_prompt: see `served_format`.

    Raises:
        ConfigError: an override that does not fit.
        ModelError: no such model, no contract, or not what the contract says.
    """
    run = Path(what).expanduser()
    if (run / "config.yaml").is_file() and not (run / "config.json").is_file():
        return _of_run(run, overrides, adapter)
    if adapter:
        raise ConfigError(
            f"--adapter belongs to a run, and '{what}' is a model; leave it out, or give the run's folder"
        )
    settings = _settings(overrides)
    folder = Path(resolve_model(what))
    prompt_format = served_format(folder, adopt, system_prompt)
    name = folder.resolve().name if run.is_dir() else what  # `.` has no name of its own
    return Target(name, folder, None, 0, "auto", prompt_format, settings, settings.guard)


def _of_run(run: Path, overrides: Sequence[str], adapter: bool) -> Target:
    from ballast.pipeline.config_loading import load_config

    config = load_config(run / "config.yaml", overrides)
    merged = next((run / place for place in _MODELS if (run / place / "config.json").is_file()), None)
    if adapter:
        merged = run / _ADAPTER.parent / "model"  # it has the contract
    if merged is None or not merged.is_dir():
        raise ModelError(
            f"run '{run}' holds no trained model yet; finish it with `ballast run {run / 'config.yaml'} --resume`"
        )
    recorded = served_format(merged)
    options = config.prompting
    declared = PromptFormat(recorded.tokenizer, options.system_prompt, options.policy, options.serving_system_prompt)
    # Under ptst the serving system prompt may be chosen after training, and the run's configuration says it.
    check_contract(merged, declared, serving=options.policy == "consistent")
    model, lora, rank = merged, None, 0
    if adapter:
        lora = run / _ADAPTER
        rank = _rank(lora)
        model = (
            run / "align" / "model"
            if config.align.enabled
            else Path(resolve_model(config.model.name, config.model.revision))
        )
        check_record(model, declared)  # its weights, too: they are served
    return Target(
        config.name, model, lora, rank, config.model.dtype, declared, config.serve, config.serve.guard or config.guard
    )


def _rank(adapter: Path) -> int:
    path = adapter / "adapter_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        return max([int(settings["r"]), *(int(rank) for rank in (settings.get("rank_pattern") or {}).values())])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"'{path}' is no adapter's configuration ({type(error).__name__}: {error}); leave --adapter out to serve the merged model"
        ) from error


def _settings(overrides: Sequence[str]) -> ServeConfig:
    """The section `serve` from overrides alone.

    Raises:
        ConfigError: an override that does not fit.
    """
    from ballast.pipeline.config_loading import apply_overrides, split_overrides
    from ballast.pipeline.config_problems import explain, report

    data: dict[str, Any] = {}
    assignments, problems = split_overrides(overrides)
    problems += apply_overrides(data, assignments)
    if problems:
        raise ConfigError(report("the command line", problems))
    try:
        return _Settings.model_validate(data).serve
    except ValidationError as error:
        given = {".".join(key) for key, _ in assignments}
        raise ConfigError(report("the command line", explain(error, data, given))) from None
