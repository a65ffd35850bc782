"""The examples of the guides run as they stand."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from ballast.pipeline.config_loading import strategies

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


@pytest.fixture
def names(tmp_path: Path, tiny_model: Any, tokenizer: Any) -> dict[str, Any]:
    """What the examples take for granted."""
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, bf16=False, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    rows = Dataset.from_list([{"input_ids": list(range(5, 15)), "labels": list(range(5, 15))}] * 4)
    refusal = {"prompt": "A harmful request", "chosen": "I can't help with that.", "rejected": "Sure"}
    ids = [[n, n + 1, n + 2] for n in range(5, 15)]
    return {
        "SFTTrainer": lambda *a, **k: SFTTrainer(*a, processing_class=tokenizer, **k),
        "model": tiny_model, "tokenizer": tokenizer, "args": args, "rows": rows, "preference_rows": [refusal] * 2,
        "lora": LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
        "harmful_ids": ids, "ordinary_ids": ids, "scary_ids": ids,
    }  # fmt: skip


@pytest.mark.model
def test_the_examples_of_safety_layers_run(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    freeze, outside, find = (code.replace("range(6, 13)", "range(1, 2)") for code in blocks("safety-layers.md"))
    exec(find, names)
    assert capsys.readouterr().out.strip()
    exec(outside, names)
    assert not any(".layers.1." in name for name, p in names["trainer"].model.named_parameters() if p.requires_grad)
    names["model"] = names["trainer"].model.unload()
    names["model"].requires_grad_(True)
    exec(freeze, names)
    frozen = {name: p.detach().clone() for name, p in names["model"].named_parameters() if ".layers.1." in name}
    names["trainer"].train()
    assert all(torch.equal(p, frozen[name]) for name, p in names["model"].named_parameters() if name in frozen)


@pytest.mark.model
def test_the_example_of_probing_runs(names: dict[str, Any]) -> None:
    from trl import SFTTrainer

    names["SFTTrainer"] = SFTTrainer
    (code,) = blocks("probing.md")
    exec(code, names)
    names["trainer"].train()
    assert names["trainer"].state.global_step == 1


def test_every_strategy_has_its_row() -> None:
    text = (DOCS / "strategies.md").read_text()
    assert re.findall(r"^\| `(\w+)`", text, re.MULTILINE) == strategies()
