"""SafeGrad in other trainers, and the example of docs/safegrad.md as it stands there."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tests.pipeline.training import safegrad_reference as reference
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from ballast import SafeGrad

pytestmark = pytest.mark.model

SAFE = reference.rows(reference.SAFE_LENGTHS, 1)
DOCS = Path(__file__).parents[3] / "docs" / "safegrad.md"


def settings(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 2e-2, "bf16": False,
        "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "gradient_checkpointing": False,
        "use_cpu": True, "seed": 3, "lr_scheduler_type": "constant", "max_grad_norm": 0.25,
    }  # fmt: skip


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def dpo(folder: Path, model: Any, tokenizer: Any, callbacks: list[Any]) -> Any:
    rows = [
        {"prompt": chat(f"Number {n}?"), "chosen": [{"role": "assistant", "content": "Yes."}], "rejected": [{"role": "assistant", "content": "No!"}]}
        for n in range(8)
    ]  # fmt: skip
    return DPOTrainer(
        model, args=DPOConfig(**settings(folder)), train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=callbacks
    )  # fmt: skip


def grpo(folder: Path, model: Any, tokenizer: Any, callbacks: list[Any]) -> Any:
    rows = Dataset.from_list([{"prompt": chat(f"Number {n}?")} for n in range(8)])

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [float(n) for n in range(len(completion_ids))]

    return GRPOTrainer(
        model, reward, args=GRPOConfig(**settings(folder), num_generations=4, max_completion_length=4), train_dataset=rows,
        processing_class=tokenizer, callbacks=callbacks,
    )  # fmt: skip


@pytest.mark.parametrize("make", [dpo, grpo])
def test_the_same_line_works_in_other_trainers_of_trl(
    tmp_path: Path, tiny_model: Any, tokenizer: Any, make: Any
) -> None:
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model, adapter)
    pristine = copy.deepcopy(model)
    before, after = reference.Watcher(), reference.Watcher()
    trainer = make(tmp_path, model, tokenizer, [before, SafeGrad(SAFE, batch_size=4), after])
    trainer.train()
    start = reference.in_float64(pristine, before.weights[0])
    exact = reference.in_float64(pristine, before.weights[1])
    u, found = (reference.vector(list(seen.gradients[1].values()), exact) for seen in (before, after))
    a, kl = reference.kl_gradient(exact, start, list(SAFE))
    assert (found - reference.combined(u, a, 1.0, 0.25)).abs().max() < 1e-6
    assert trainer.state.log_history[1]["safegrad/alignment_kl"] == pytest.approx(kl, rel=1e-3)


def test_the_example_of_the_docs_runs_as_it_stands_there(
    tmp_path: Path, tiny_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": chat(f"Number {n}?"), "completion": [{"role": "assistant", "content": f"It is {n}."}]}
        for n in range(8)
    ]
    scope: dict[str, Any] = {
        "model": tiny_model,
        "tokenizer": tokenizer,
        "dataset": Dataset.from_list(rows),
        "lora": LoraConfig(r=2, task_type="CAUSAL_LM"),
    }
    exec(compile(code, str(DOCS), "exec"), scope)
    trainer = scope["trainer"]
    assert trainer.state.global_step == 3
    assert sum("SafeGrad(" in line for line in code.splitlines()) == 1
    # The last log is one of the end of training; ours stand beside the loss.
    assert any(isinstance(callback, SafeGrad) and callback._figures for callback in trainer.callback_handler.callbacks)
