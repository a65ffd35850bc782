"""A merged folder is whole, recorded, and refused where its weights do not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from ballast.errors import ModelError
from ballast.models import file_sha256
from ballast.pipeline.model_record import check_record
from ballast.pipeline.prompting import PromptFormat
from ballast.pipeline.training import merge
from ballast.pipeline.training.merge import save_merged

pytestmark = pytest.mark.model


def adapted(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_weight_is_written_and_tied_ones_once(
    tiny_model: Any, tokenizer: Any, tmp_path: Path, tied: bool, dtype: torch.dtype
) -> None:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    tiny_model.config.tie_word_embeddings = tied
    model = LlamaForCausalLM(tiny_model.config).to(dtype)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # A new adapter adds nothing: its B is zero.
    save_merged(adapted(model), tokenizer, PromptFormat(tokenizer), tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tied
    read = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").state_dict()
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(read[name], tensor), name


def test_a_merged_folder_records_its_weights_and_format(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    import json

    prompt_format = PromptFormat(tokenizer, "Be kind.")
    save_merged(adapted(tiny_model), tokenizer, prompt_format, tmp_path)
    assert json.loads((tmp_path / "prompt_format.json").read_text()) == {
        "fingerprint": prompt_format.fingerprint(),
        "contract": prompt_format.contract().to_json(),
        "weights_sha256": {"model.safetensors": file_sha256(tmp_path / "model.safetensors")},
    }
    check_record(tmp_path, prompt_format)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit_are_a_model_error(
    tiny_model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    weights = dict(tiny_model.named_parameters())
    if change == "missing":
        del weights["model.norm.weight"]
    else:
        weights["model.norm.weight" if change == "shape" else "other.weight"] = torch.zeros(3)
    monkeypatch.setattr(merge, "iterate_policy_weights", lambda model: iter(weights.items()))
    with pytest.raises(ModelError, match=r"merged weights do not fit LlamaForCausalLM .*lora\.target_modules"):
        save_merged(tiny_model, tokenizer, PromptFormat(tokenizer), tmp_path)
    assert not list(tmp_path.iterdir())
