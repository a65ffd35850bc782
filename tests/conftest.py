"""Shared fixtures: the embedded tokenizer, tiny models, one vLLM engine for all tests that need it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@pytest.fixture(scope="session")
def embedded_folder() -> Path:
    """The embedded model's folder, converted on first use."""
    from ballast.models import embedded_model

    return embedded_model()


@pytest.fixture(scope="session")
def tokenizer(embedded_folder: Path) -> Any:
    """The embedded model's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded_folder)


@pytest.fixture
def tiny_model(tokenizer: Any) -> Any:
    """A random Llama of 2 layers with the embedded model's vocabulary, fp32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def vllm_engine(embedded_folder: Path) -> Iterator[Any]:
    """One vLLM engine with the embedded model. A test that loads other weights puts the first ones back."""
    from ballast.pipeline.config_inputs import VLLMGeneration
    from ballast.pipeline.vllm_engine import VLLMEngine

    engine = VLLMEngine(str(embedded_folder), VLLMGeneration(max_model_len=512))
    yield engine
    engine.close()
