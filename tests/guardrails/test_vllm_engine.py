"""vLLM as a guard's engine against the reference engine, on a random Llama and one start of the real thing."""

import os
import random
import sys
from types import SimpleNamespace

import pytest

from ballast.errors import EngineError
from ballast.guardrails.engines.interface import Labels
from ballast.guardrails.engines.options import VLLMEngineOptions
from ballast.guardrails.engines.per_prefix import PerPrefixEngine
from ballast.guardrails.engines.vllm import VLLMVerdictEngine
from ballast.vllm_environment import start_vllm

LABELS = Labels(safe=(3, 4), unsafe=(7,))
CONTEXT = 256


@pytest.fixture(scope="module")
def random_llama():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,  # the least that vLLM's CPU kernels take
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def engine(random_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("random_llama")
    random_llama.save_pretrained(folder)
    started = VLLMVerdictEngine(str(folder), VLLMEngineOptions(), LABELS, "float32", None)
    yield started
    started.close()


@pytest.mark.vllm
def test_it_agrees_with_the_reference_and_leaves_only_what_is_too_long_unscored(engine, random_llama):
    draw = random.Random(0)
    groups = []
    for length in (200, 90):
        response = [draw.randrange(8, 64) for _ in range(length)]
        groups.append([[*response[:cut], 5, 6] for cut in range(10, length, 9)])
    groups.append([[9], [9] * (CONTEXT - 1), [9] * CONTEXT, [9]])
    reference = PerPrefixEngine(random_llama, LABELS, batch_size=8, context=CONTEXT - 1).score(groups)
    for _ in range(2):  # the second time everything is found in the cache
        verdicts = engine.score(groups)
        assert [len(group) for group in verdicts] == [len(group) for group in groups]
        for group, expected in zip(verdicts, reference, strict=True):
            for verdict, true in zip(group, expected, strict=True):
                assert verdict.reason == true.reason
                assert verdict.risk == pytest.approx(true.risk, abs=1e-4)
                assert verdict.label_mass == pytest.approx(true.label_mass, abs=1e-4)
    assert verdicts[2][2].reason == "the rendered prompt has 256 tokens and the guard reads 255"


@pytest.mark.vllm
def test_what_the_prompts_of_an_exchange_share_is_computed_once(engine):
    # 128 shared tokens are 4 blocks of 32; three prompts with other ends find them in the cache of the longest.
    shared = [10 + n % 50 for n in range(128)]
    cached = []
    generate = engine._llm.generate

    def watched(*args, **kwargs):
        outputs = generate(*args, **kwargs)
        cached.extend(output.num_cached_tokens for output in outputs)
        return outputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._llm, "generate", watched)
        engine.score([[[*shared, 11], [*shared, 12, 13], [*shared, 14, 15, 16]]])
    assert cached == [0, 128, 128]  # the longest first


def test_a_machine_without_vllm_is_told_what_to_set(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vllm", None)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(EngineError, match=r"vLLM cannot be imported .* set the guard's engine to auto"):
        VLLMVerdictEngine(str(tmp_path), VLLMEngineOptions(), LABELS, "float32", None)


def test_each_engine_has_a_cpu_cache_of_its_own_size_unless_the_user_set_one(monkeypatch):
    seen = []

    def refuse(**arguments):
        seen.append(os.environ["VLLM_CPU_KVCACHE_SPACE"])
        raise ValueError("first line\nno room")

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=refuse))
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    for size in (2, 3):
        with pytest.raises(EngineError, match=r"did not start for model 'm': ValueError: no room. Lower it if memory"):
            start_vllm(model="m", cpu_kv_cache_gib=size, smaller="Lower it", instead="wait")
    assert "VLLM_CPU_KVCACHE_SPACE" not in os.environ
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    with pytest.raises(EngineError):
        start_vllm(model="m", cpu_kv_cache_gib=2, smaller="Lower it", instead="wait")
    assert seen == ["2", "3", "7"]
