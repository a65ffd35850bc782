"""localize: which layers of the model that training starts from tell harmful requests from harmless ones.

Three seeds must agree, or none are named and the reason is written down (`freeze.layers: localized` then stops the run). No
prompt that is measured on is looked at.

Writes `layers.json` (scores with their bands, what each seed found, the chosen range or null and why) and `layers.svg`.
"""

import json
from pathlib import Path

from ballast.pipeline.context import RunContext, load_policy
from ballast.pipeline.data import Row, load_rows
from ballast.pipeline.run_folder import write_text
from ballast.pipeline.safety_layers import LAYERS_FILE
from ballast.pipeline.stages.align import check_not_measured

_LABELS = {
    "gap": "gap of angles, radians",
    "ablation": "fall of refusals without the layer",
    "scaling": "gap of angles, radians",
}


def run_stage(context: RunContext, folder: Path) -> None:
    """Ask the model, choose, write down."""
    from ballast.pipeline.localization.figure import figure
    from ballast.pipeline.localization.localize import localize_safety_layers

    config, settings = context.config, context.config.localize
    rows = localization_rows(context)
    ids = {
        kind: [context.prompt_format.encode_request(row.id, row.prompt) for row in rows if row.kind == kind]
        for kind in ("harmful", "ordinary", "scary")
    }
    model = load_policy(context.reference_model, config.model.dtype)
    with context.progress(f"localize: {settings.method}", settings.seeds) as done:
        found = localize_safety_layers(
            model, context.tokenizer, ids["harmful"], ids["ordinary"], ids["scary"], settings, config.seed, done
        )
    write_text(folder / LAYERS_FILE, json.dumps(found.to_json(), indent=2))
    title = f"{settings.method}: " + (
        "no safety layers" if found.layers is None else "layers {} to {}".format(*found.layers)
    )
    write_text(folder / "layers.svg", figure(found.curves, found.layers, title, _LABELS[settings.method]))
    context.say(f"  {title} ({found.reason})")


def localization_rows(context: RunContext) -> list[Row]:
    """The prompts of `localize.data`, none of which is measured on.

    Raises:
        DataError: one is.
    """
    config = context.config
    rows = load_rows(config.localize.data, "train", config.data)
    check_not_measured(config, rows, "localize.data")
    return rows
