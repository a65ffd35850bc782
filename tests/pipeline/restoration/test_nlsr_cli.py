"""`ballast restore nlsr` on tiny models with the embedded tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from tests.pipeline.restoration.checkpoints import save_tiny_models
from typer.testing import CliRunner

from ballast.pipeline import cli
from ballast.pipeline.model_record import write_record
from ballast.pipeline.prompting import PromptFormat

pytestmark = pytest.mark.model


@pytest.fixture
def models(tmp_path: Path, tiny_model: Any, tokenizer: Any) -> Path:
    """base, aligned and tuned, of which the last two differ from the base in their linear modules alone."""
    save_tiny_models(tmp_path, tiny_model, tokenizer)
    write_record(tmp_path / "aligned", PromptFormat(tokenizer, "Be safe."))
    rows = [
        {
            "id": f"c{i}",
            "prompt": f"A harmful request, number {i}",
            "response": "I can't help with that.",
            "kind": "harmful",
        }
        for i in range(3)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def invoke(models: Path, *options: str) -> Any:
    words = [word for name in ("base", "aligned", "tuned") for word in (f"--{name}", str(models / name))]
    rows = ["--calibration", str(models / "rows.jsonl")]
    return CliRunner().invoke(cli.app, ["restore", "nlsr", *words, "--out", str(models / "out"), *rows, *options])


def test_nlsr_from_the_command_line(models: Path) -> None:
    result = invoke(models, "--system-prompt", "Be safe.", "--share", "0.5")
    assert result.exit_code == 0, result.output
    # 7 linear modules in each of 2 layers, half of them; embedding (tied), 5 norms.
    assert "7 tensors changed, 13 left as they were" in result.stdout
    assert "mean similarity" in result.stdout
    record = json.loads((models / "out" / "restoration.json").read_text())
    # "I can't help with that." and its end of turn are 8 tokens of SmolLM2, in each of 3 rows.
    assert record["settings"]["calibration_tokens"] == 3 * 8
    assert (models / "out" / "tokenizer.json").is_file()


def test_a_lora_is_written_where_a_rank_is_given(models: Path) -> None:
    result = invoke(models, "--system-prompt", "Be safe.", "--lora-rank", "4")
    assert result.exit_code == 0, result.output
    assert "a LoRA of rank 4 over base" in result.stdout
    stored = load_file(models / "out" / "adapter_model.safetensors")
    assert len(stored) == 2 * 14
    assert not (models / "out" / "config.json").exists()
    assert (models / "out" / "tokenizer.json").is_file()


def test_another_prompt_format_than_the_aligned_models_is_refused(models: Path) -> None:
    result = invoke(models)
    assert result.exit_code == 2
    assert "was made under another prompt format" in result.stderr
    assert not (models / "out").exists()


def test_an_output_that_is_there_is_refused_before_the_model_runs(models: Path) -> None:
    (models / "out").mkdir()
    (models / "out" / "mine.txt").write_text("mine")
    result = invoke(models, "--system-prompt", "Be safe.")
    assert result.exit_code == 2
    assert "exists already" in result.stderr
    assert [path.name for path in (models / "out").iterdir()] == ["mine.txt"]
