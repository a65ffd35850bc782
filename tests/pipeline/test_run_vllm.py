"""The whole run on real parts: the embedded model, vLLM, the embedded guard, TRL, in a minute."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from ballast.errors import EngineError
from ballast.pipeline.config_inputs import VLLMGeneration
from ballast.pipeline.config_loading import load_config
from ballast.pipeline.context import RunContext
from ballast.pipeline.run import run
from ballast.pipeline.vllm_engine import VLLMEngine

pytestmark = [pytest.mark.model, pytest.mark.vllm]

SMALL = [
    "data.max_test=4", "data.max_train=8", "evaluate.samples=1", "evaluate.sampling.max_new_tokens=12", "align.max_rows=4",
    "align.epochs=1", "train.steps=2", "train.prompts_per_step=2", "train.group_size=2", "train.micro_batch_size=4",
    "train.sampling.max_new_tokens=12", "rollout.sampling.max_new_tokens=8",
]  # fmt: skip


def test_the_main_job_runs_from_start_to_table(
    vllm_engine: Any, embedded_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = load_config("demo", [*SMALL, f"out={tmp_path}", "name=whole"])
    context = RunContext(config)
    context.__dict__["engine"] = vllm_engine  # the suite's one engine
    try:
        run(config, context=context)
        run(config, stages=["rollout", "score"], context=context)
    finally:
        vllm_engine.load_folder(str(embedded_folder))
    folder = tmp_path / "whole"
    summary = json.loads((folder / "report" / "summary.json").read_text())
    assert list(summary["rows"]) == ["start", "after align", "after GRPO"]
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in steps if line.get("event") == "step" and line["stage"] == "train"]
    assert [line["step"] for line in steps] == [1, 2]
    # A missed weight sync shows as a difference of log-probs of .19 and more; bf16 noise is .03 to .06.
    assert all(
        line["sampling/sampling_logp_difference/mean"] < 0.12
        for line in steps
        if "sampling/sampling_logp_difference/mean" in line
    )
    rows = pq.read_table(folder / "train" / "completions").to_pylist()
    assert len(rows) == 8
    assert all(len(row["token_ids"]) == len(row["advantages"]) and len(row["cuts"]) == len(row["risk"]) for row in rows)
    scored = pq.read_table(folder / "score" / "scores.parquet").to_pylist()
    assert len(scored) == 8
    assert (folder / "train" / "model" / "model.safetensors").is_file()
    printed = "".join(capfd.readouterr())
    assert not [row for row in rows if len(row["completion"]) > 20 and row["completion"] in printed]  # never the text


def test_a_vllm_that_does_not_start_says_what_to_do() -> None:
    from ballast.models import embedded_model

    with pytest.raises(EngineError, match=r"did not start.*generation\.max_model_len \(now 900000\)"):
        VLLMEngine(str(embedded_model()), VLLMGeneration(max_model_len=900_000))


def test_weights_that_the_engine_refuses_are_an_engine_error_with_its_last_words() -> None:
    class Runner:
        def reload_weights(self, weights_iterator: Any) -> None:
            list(weights_iterator)
            raise AssertionError("shape mismatch")

    engine = object.__new__(VLLMEngine)  # a real engine must not be used after such a failure
    engine.model = "m"
    runner = SimpleNamespace(model_runner=Runner())
    engine.llm = SimpleNamespace(
        llm_engine=SimpleNamespace(model_executor=SimpleNamespace(driver_worker=runner)),
        reset_prefix_cache=lambda: True,
    )
    with pytest.raises(EngineError, match=r"refused the new weights of 'm': AssertionError: shape mismatch"):
        engine.load_weights([])
