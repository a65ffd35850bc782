"""Frozen layers, probing and regularisation of a run, as its configuration asks for them; nothing where they are off."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ballast.errors import ConfigError, DataError
from ballast.pipeline.config_safety_layers import preset_layers
from ballast.pipeline.data import Row, draw, load_rows, normalise
from ballast.pipeline.stages.align import peft_config, rows_with_answers

if TYPE_CHECKING:
    from ballast.pipeline.config import RunConfig
    from ballast.pipeline.config_base import LoraConfig
    from ballast.pipeline.context import RunContext

LAYERS_FILE = "layers.json"


def frozen_layers(context: "RunContext", model: Any) -> tuple[int, ...]:
    """The layers that do not learn; none where `freeze.layers` is not given.

    Raises:
        ConfigError: they are to be localised, and localisation named none; or the model has no such layer.
    """
    from ballast.pipeline.training.layers import check_layers, decoder_layers

    asked = context.config.freeze.layers
    if asked is None:
        return ()
    if asked == "preset":
        (first, last), reason = preset_layers(context.config.model.name, len(decoder_layers(model)))
    elif asked == "localized":
        found = json.loads((context.folder.stage("localize") / LAYERS_FILE).read_text())
        if found["layers"] is None:
            raise ConfigError(
                f"freeze.layers = localized, and the stage localize named no safety layers ({found['reason']}); set freeze.layers to "
                "preset or to a range such as [11, 19], try another localize.method, or freeze nothing"
            )
        (first, last), reason = found["layers"], "as the stage localize found"
    else:
        (first, last), reason = asked, "as configured"
    layers = check_layers(model, range(first, last + 1))
    context.say(f"  layers {first} to {last} are frozen ({reason})")
    return layers


def adapter(context: "RunContext", model: Any, lora: "LoraConfig") -> Any:
    """The adapter of a configuration, as PEFT takes it, on the layers that are not frozen."""
    from ballast.pipeline.training.freezing import adapter_outside

    layers = frozen_layers(context, model)
    return adapter_outside(peft_config(lora), model, layers) if layers else peft_config(lora)


def trainer_with(context: "RunContext", base: type) -> tuple[Any, dict[str, Any]]:
    """The trainer's class with probing and the KL to the start model where they are on, and what they are given.

    Raises:
        DataError: rows of probing that cannot be used.
    """
    config = context.config
    mixins: list[type] = []
    given: dict[str, Any] = {}
    if config.probing.enabled:
        from ballast.pipeline.training.probing import SafetyProbing
        from ballast.pipeline.training.safety_pairs import encode_pairs

        mixins.append(SafetyProbing)
        pairs = encode_pairs(preference_rows(config), context.prompt_format, config.probing.max_length)
        given |= {"probing": config.probing, "safety_pairs": pairs}
    if config.regularization.kl_weight > 0:
        from ballast.pipeline.training.start_kl import StartModelKL

        mixins.append(StartModelKL)
        settings = config.regularization
        given |= {"start_kl_weight": settings.kl_weight, "start_kl_tokens": settings.kl_tokens}
    if not mixins:
        return base, {}
    # Probing stands outermost: the task's loss that it probes is the whole of it.
    return type(f"Safe{base.__name__}", (*mixins, base), {}), given


def callbacks_before(config: "RunConfig") -> list[Any]:
    """What adds to the task's gradient; it goes before SafeGrad, which then sees the whole."""
    from ballast.pipeline.training.regularization import L2ToStart

    weight = config.regularization.l2_weight
    return [L2ToStart(weight)] if weight > 0 else []


def callbacks_after(config: "RunConfig") -> list[Any]:
    """What follows the weights; it goes after SafeGrad, which may change them once more."""
    from ballast.pipeline.training.regularization import WeightAverage

    decay = config.regularization.ema_decay
    return [] if decay is None else [WeightAverage(decay)]


def preference_rows(config: "RunConfig") -> list[dict[str, Any]]:
    """The harmful prompts of `probing.data` with the refusal of the data and a harmful answer, or how one would begin.

    Raises:
        DataError: no harmful row, one without an answer, one without its harmful answer, or a test prompt.
    """
    settings = config.probing
    rows = [row for row in rows_with_answers(config, settings.data, "probing.data", None) if row.kind == "harmful"]
    if not rows:
        raise DataError(
            "probing.data has no harmful prompt to take the harmful direction from; name a source that has some"
        )
    rejected: dict[str, Any] = {}
    if column := settings.rejected_column:
        found = load_rows(settings.data, "train", config.data, answers=True, columns=[column])
        rejected = {row.id: row.columns.get(column) for row in found}
        lacking = [row.id for row in rows if not isinstance(rejected[row.id], str) or not rejected[row.id].strip()]
        if lacking:
            raise DataError(
                f"{len(lacking)} of {len(rows)} harmful rows of probing.data have no text in probing.rejected_column = '{column}' (first: row "
                f"{lacking[0]}); mend them, or leave the key out, which takes probing.compliance for all"
            )
    return [
        {
            "id": row.id,
            "prompt": row.prompt,
            "chosen": row.response,
            "rejected": rejected.get(row.id, settings.compliance),
        }
        for row in rows
    ]


def safety_rows(config: "RunConfig", rows: Sequence[Row]) -> list[Row]:
    """As many further rows as make `regularization.safety_share` of the whole; none at 0.

    Args:
        config: the run.
        rows: what is imitated without them; a prompt that stands there is not taken again.

    Raises:
        DataError: too few safety rows, or one that is measured on too.
    """
    settings = config.regularization
    if settings.safety_share == 0:
        return []
    known = {normalise(row.prompt) for row in rows}
    pool = rows_with_answers(config, settings.safety_data, "regularization.safety_data", None)
    pool = [row for row in pool if normalise(row.prompt) not in known]
    wanted = max(1, round(len(rows) * settings.safety_share / (1 - settings.safety_share)))
    if len(pool) < wanted:
        raise DataError(
            f"regularization.safety_share = {settings.safety_share} of {len(rows)} rows takes {wanted} safety rows, and "
            f"regularization.safety_data has {len(pool)} whose prompts are not among them already; lower the share or name more sources"
        )
    return draw(pool, wanted, config.seed)
