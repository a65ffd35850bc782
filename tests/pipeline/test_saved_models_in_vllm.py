"""What probing and restoration leave behind is an ordinary model: transformers and vLLM load it, and it answers."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from ballast import SafetyProbing, lox, nlsr
from ballast.pipeline.config_probing import ProbingConfig
from ballast.pipeline.restoration.models import open_models
from ballast.pipeline.restoration.nlsr.activations import CalibrationRow
from ballast.pipeline.restoration.nlsr.settings import NLSRSettings
from ballast.pipeline.restoration.restore import restore
from ballast.pipeline.restoration.safe_lora import SafeLora
from ballast.pipeline.restoration.task_arithmetic import Resta
from ballast.pipeline.training.safety_pairs import SafetyPair

pytestmark = [pytest.mark.model, pytest.mark.vllm, pytest.mark.timeout(600)]

LAYER = ("*.12.*",)  # one layer is enough to tell whether the engine got it
QUESTION = "The capital of France is"


@pytest.fixture(scope="module")
def models(embedded_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, aligned and tuned: the embedded model, and two that differ from it in matrices of one layer."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "base").symlink_to(embedded_folder)
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder)
    generator = torch.Generator().manual_seed(0)
    for name in ("aligned", "tuned"):
        model = AutoModelForCausalLM.from_pretrained(embedded_folder, dtype=torch.bfloat16)
        mlp = model.model.layers[12].mlp.down_proj.weight
        factors = [torch.randn(size, 2, generator=generator) for size in mlp.shape]
        with torch.no_grad():
            mlp.add_((factors[0] @ factors[1].T).to(mlp.dtype) * 0.06)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def repaired_by_lox(models: Path, out: Path) -> None:
    base, aligned, tuned = (str(models / name) for name in ("base", "aligned", "tuned"))
    lox(base, aligned, tuned, out=out, rank=2, alpha=0.5, modules=LAYER)


def repaired_by_nlsr(models: Path, out: Path) -> None:
    base, aligned, tuned = (str(models / name) for name in ("base", "aligned", "tuned"))
    rows = [CalibrationRow(tuple(range(100, 120)), 8)]
    nlsr(base, aligned, tuned, rows=rows, out=out, settings=NLSRSettings(rank=2, share=1.0, modules=LAYER))


def repaired_by_safe_lora(models: Path, out: Path) -> None:
    opened = open_models(*(str(models / name) for name in ("base", "aligned", "tuned")))
    restore(SafeLora(1.0, LAYER), opened, out)


def repaired_by_resta(models: Path, out: Path) -> None:
    opened = open_models(*(str(models / name) for name in ("base", "aligned", "tuned")))
    restore(Resta(0.5, LAYER), opened, out)


def trained_with_probing(models: Path, out: Path) -> None:
    """One step of full fine-tuning."""
    from trl import SFTConfig, SFTTrainer

    class ProbedSFT(SafetyProbing, SFTTrainer):
        pass

    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    model = AutoModelForCausalLM.from_pretrained(models / "base", dtype=torch.float32)
    args = SFTConfig(
        output_dir=str(out.parent / "trainer"), max_steps=1, per_device_train_batch_size=1, learning_rate=1e-3, bf16=False,
        use_cpu=True, report_to="none", save_strategy="no", gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "Name a fruit.", "completion": " An apple."}])
    pairs = [SafetyPair((5, 6, 7), (10, 11, 2), (20, 21, 22, 2))]
    trainer = ProbedSFT(
        model,
        args,
        train_dataset=rows,
        processing_class=tokenizer,
        probing=ProbingConfig(batch_size=1),
        safety_pairs=pairs,
    )
    trainer.train()
    trainer.model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


MADE: dict[str, Callable[[Path, Path], None]] = {
    "lox": repaired_by_lox,
    "nlsr": repaired_by_nlsr,
    "safe-lora": repaired_by_safe_lora,
    "resta": repaired_by_resta,
    "probing": trained_with_probing,
}


@pytest.mark.parametrize("how", MADE)
def test_vllm_writes_with_it_what_transformers_makes_of_it(
    how: str, models: Path, tmp_path: Path, vllm_engine: Any, embedded_folder: Path
) -> None:
    out = tmp_path / how
    MADE[how](models, out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    prompt = tokenizer(QUESTION)["input_ids"]
    try:
        vllm_engine.load_folder(str(out))
        output = vllm_engine.generate([prompt], max_tokens=8, temperature=1.0, seeds=[3])[0]
    finally:
        vllm_engine.load_folder(str(embedded_folder))
    ids = list(output.token_ids)
    engine = torch.tensor([step[token].logprob for step, token in zip(output.logprobs, ids, strict=True)])

    def log_probs(folder: Path) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        assert type(model).__name__ == "LlamaForCausalLM"
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
        return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]

    own, others = (float((engine - log_probs(folder)).abs().mean()) for folder in (out, models / "base"))
    assert own < 0.15  # bfloat16, as for the embedded model itself
    assert others > 3 * own  # the engine has these weights, not those it was started with


@pytest.mark.long
@pytest.mark.parametrize("how", MADE)
def test_a_vllm_that_is_started_with_it_answers(how: str, models: Path, tmp_path: Path) -> None:
    out = tmp_path / how
    MADE[how](models, out)
    code = (
        "import sys\n"
        "from ballast.pipeline.config_inputs import VLLMGeneration\n"
        "from ballast.pipeline.vllm_engine import VLLMEngine\n"
        "engine = VLLMEngine(sys.argv[1], VLLMGeneration(max_model_len=128))\n"
        "print('tokens', len(engine.generate([[1, 2, 3]], max_tokens=4, temperature=0.0)[0].token_ids))\n"
        "engine.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=False)
    assert "tokens 4" in done.stdout, done.stderr[-2000:]
