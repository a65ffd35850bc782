"""From a config to an engine: short forms, refusals that name what to use instead, and what `auto` picks."""

import logging

import pytest
from pydantic import TypeAdapter, ValidationError

from ballast.errors import GuardError
from ballast.guardrails.engines.build import build_engine, load_causal, local_engine
from ballast.guardrails.engines.interface import Labels
from ballast.guardrails.engines.options import (
    AutoEngine,
    EngineOptions,
    KVForkOptions,
    OnePassOptions,
    PerPrefixOptions,
    ServerOptions,
)

LABELS = Labels((3, 4), (7,))
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHARED = [OnePassOptions(), KVForkOptions()]


def tiny(kind, **settings):
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **settings})
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def local(options, model):
    return local_engine(options, model, LABELS, batch_size=4, context=128, guard="tiny")


def test_a_name_is_the_short_form_of_an_engine():
    parse = TypeAdapter(EngineOptions).validate_python
    assert parse("kv_fork") == KVForkOptions()
    assert parse({"type": "one_pass", "max_tokens": 64}) == OnePassOptions(max_tokens=64)
    assert parse(AutoEngine()) == AutoEngine()
    with pytest.raises(ValidationError, match="'auto', 'per_prefix', 'one_pass', 'kv_fork', 'vllm', 'server'"):
        parse("flash")
    with pytest.raises(ValidationError, match="base_url"):
        parse("server")
    with pytest.raises(ValidationError, match="Extra inputs"):
        parse({"type": "per_prefix", "max_tokens": 64})


@pytest.mark.parametrize("options", SHARED, ids=lambda options: options.type)
@pytest.mark.parametrize(
    ("kind", "settings", "why"),
    [
        ("Gemma2", {"head_dim": 8}, "soft-capped at 50"),
        ("Mistral", {"sliding_window": 16}, "window of 16 tokens"),
        ("Gemma3", {"head_dim": 8, "sliding_window": 16}, "window of 16 tokens"),
        ("Mamba", {}, "state from token to token"),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "longest prompt of the forward",
        ),
        ("Bloom", {"n_head": 4, "n_layer": 2}, "its forward fails"),
    ],
)
def test_a_model_that_a_mask_cannot_split_is_refused_and_told_what_to_use(options, kind, settings, why):
    if kind == "Gemma3":
        import transformers

        model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**{**SIZES, **settings}))
    else:
        model = tiny(kind, **settings)
    with pytest.raises(
        GuardError, match=rf"'tiny': engine {options.type} .*{why}.*set engine to per_prefix, or to vllm"
    ):
        local(options, model)
    assert local(PerPrefixOptions(), model).name == "per_prefix"


@pytest.mark.parametrize("options", SHARED, ids=lambda options: options.type)
def test_a_window_that_holds_every_prompt_is_none(options):
    assert local(options, tiny("Mistral", sliding_window=128)).name == options.type
    assert local(options, tiny("Mistral", sliding_window=None)).name == options.type
    assert local(options, tiny("Qwen2", sliding_window=16, use_sliding_window=False)).name == options.type


@pytest.mark.parametrize("options", SHARED, ids=lambda options: options.type)
@pytest.mark.parametrize("fault", ["mask", "positions"])
def test_the_trial_refuses_a_model_that_the_config_does_not_give_away(options, fault, monkeypatch):
    model = tiny("Llama")
    inner = model.model.forward

    def forward(**kwargs):
        if fault == "positions":  # a model that counts its positions itself
            kwargs["position_ids"] = None
        elif (mask := kwargs.get("attention_mask")) is not None and mask.dim() == 4:
            kwargs["attention_mask"] = None  # one that takes no mask but its own
        return inner(**kwargs)

    monkeypatch.setattr(model.model, "forward", forward)
    with pytest.raises(GuardError, match="trial on random prompts"):
        local(options, model)


def test_auto_takes_one_pass_where_it_is_exact_and_says_so(caplog):
    with caplog.at_level(logging.INFO, logger="ballast"):
        assert local(AutoEngine(), tiny("Llama")).name == "one_pass"
    assert "tiny: engine one_pass on cpu" in caplog.text


def test_auto_falls_back_to_per_prefix_and_says_why(caplog):
    with caplog.at_level(logging.INFO, logger="ballast"):
        assert local(AutoEngine(), tiny("Mistral", sliding_window=16)).name == "per_prefix"
    assert "tiny: engine per_prefix on cpu" in caplog.text
    assert "window of 16 tokens" in caplog.text


def build(folder, options):
    return build_engine(
        options,
        model=str(folder),
        revision=None,
        labels=LABELS,
        dtype="float32",
        device="cpu",
        batch_size=4,
        guard="tiny",
    )


def test_soft_capping_is_loaded_with_attention_that_keeps_it(tmp_path):
    import torch

    model = tiny("Gemma2", head_dim=8, attn_logit_softcapping=1.0)
    model.save_pretrained(tmp_path)
    loaded, context = load_causal(str(tmp_path), None, dtype="float32", device="cpu", guard="tiny")
    ids = torch.arange(5, 25)[None]
    model.set_attn_implementation("eager")
    want = model(ids).logits
    assert torch.allclose(loaded(ids).logits, want, atol=1e-5)
    model.set_attn_implementation("sdpa")
    assert not torch.allclose(model(ids).logits, want, atol=1e-2)  # what a plain load would have run
    assert context == 128


def test_an_engine_comes_ready_from_a_model_folder(tmp_path):
    tiny("Llama").save_pretrained(tmp_path)
    prompts = [[[5, 6, 9], [5, 6, 8, 9]]]
    risks = [[verdict.risk for verdict in build(tmp_path, options).score(prompts)[0]] for options in SHARED]
    assert risks[0] == pytest.approx(risks[1], abs=1e-5)


def test_a_cache_file_answers_for_every_engine_over_the_same_weights(tmp_path):
    tiny("Llama").save_pretrained(tmp_path / "model")
    cache = tmp_path / "deep" / "verdicts.sqlite"
    prompts = [[[5, 6, 9], [5, 6, 8, 9], [1] * 200], [[5, 6, 9]]]
    first = build(tmp_path / "model", OnePassOptions(cache=cache)).score(prompts)
    second = build(tmp_path / "model", KVForkOptions(cache=cache))
    assert second.name == "kv_fork"
    asked = []
    inner = second._engine.score
    second._engine.score = lambda groups: asked.extend(groups) or inner(groups)
    assert second.score(prompts) == first
    assert asked == [[[1] * 200], []]  # unscored, so never kept


def test_other_weights_labels_or_precision_are_other_verdicts(tmp_path):
    from ballast.guardrails.engines.cache import CachedEngine, weights_identity

    class Fixed:
        name = "fixed"

        def __init__(self, risk):
            self.risk = risk

        def score(self, groups):
            from ballast.guardrails.engines.interface import Verdict

            return [[Verdict(self.risk, label_mass=1.0) for _ in group] for group in groups]

    def ask(identity, risk):
        ((verdict,),) = CachedEngine(Fixed(risk), tmp_path / "v.sqlite", identity, "tiny").score([[[1, 2]]])
        return verdict.risk

    assert ask(("a", LABELS.safe, "float32"), 0.1) == 0.1
    assert ask(("a", LABELS.safe, "float32"), 0.9) == 0.1  # kept
    assert ask(("a", LABELS.safe, "bfloat16"), 0.9) == 0.9
    assert ask(("a", LABELS.unsafe, "float32"), 0.8) == 0.8

    tiny("Llama").save_pretrained(tmp_path / "model")
    before = weights_identity(str(tmp_path / "model"), None)
    tiny("Llama", num_hidden_layers=1).save_pretrained(tmp_path / "model")
    assert weights_identity(str(tmp_path / "model"), None) != before


def test_a_cache_that_is_no_database_is_refused_with_what_to_do(tmp_path):
    from ballast.guardrails.engines.cache import CachedEngine

    engine = local(PerPrefixOptions(), tiny("Llama"))
    (tmp_path / "v.sqlite").write_text("not a database, but long enough that SQLite reads it as a header" * 20)
    with pytest.raises(GuardError, match=r"'tiny': the cache of verdicts .*v.sqlite.* move that file away"):
        CachedEngine(engine, tmp_path / "v.sqlite", (), "tiny")


def test_a_server_needs_no_weights_here():
    engine = build("no/such/folder/here", ServerOptions(base_url="http://localhost:1/v1"))
    assert engine.name == "server"
