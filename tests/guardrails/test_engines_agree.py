"""one_pass and kv_fork say what per_prefix says, whatever the prompts share and however they are packed."""

from itertools import chain

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ballast.guardrails.engines.interface import Labels
from ballast.guardrails.engines.kv_fork import KVForkEngine
from ballast.guardrails.engines.one_pass import OnePassEngine
from ballast.guardrails.engines.per_prefix import PerPrefixEngine

VOCABULARY, CONTEXT = 40, 64
LABELS = Labels((3, 4), (7,))
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
ENGINES = {"one_pass": OnePassEngine, "kv_fork": KVForkEngine}


def tiny(kind, dtype="float32"):
    import torch
    import transformers

    head = {} if kind == "Llama" else {"head_dim": 8}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,  # large enough that risks differ between prompts
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **head,
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval().to(getattr(torch, dtype))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module", params=["Llama", "Qwen3", "Gemma"])
def reference(request, dtype):
    return PerPrefixEngine(tiny(request.param, dtype), LABELS, batch_size=3, context=CONTEXT)


@pytest.fixture(scope="module")
def llama():
    return PerPrefixEngine(tiny("Llama"), LABELS, batch_size=3, context=CONTEXT)


ids = st.integers(0, VOCABULARY - 1)


@st.composite
def groups(draw):
    """Exchanges as a guard renders them: prompt, response up to a cut, suffix. At a cut the tokenizer may write
    the last word otherwise, and the exchanges of one prompt share it."""
    prompt = draw(st.lists(ids, max_size=12))
    suffix = draw(st.lists(ids, min_size=0, max_size=4))
    made = []
    for _ in range(draw(st.integers(1, 3))):
        own = prompt if draw(st.booleans()) else draw(st.lists(ids, max_size=12))
        response = draw(st.lists(ids, min_size=1, max_size=30))
        cuts = sorted(draw(st.sets(st.integers(0, len(response)), min_size=1, max_size=6)))
        rows = []
        for cut in cuts:
            torn = (
                draw(st.lists(ids, min_size=1, max_size=2)) if cut and draw(st.booleans()) else response[cut - 1 : cut]
            )
            rows.append([*own, *response[: max(cut - 1, 0)], *(torn if cut else []), *suffix])
        made.append([row for row in rows if row])
    return made


@pytest.mark.parametrize("name", ENGINES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(groups=groups(), max_tokens=st.integers(1, 200))
def test_an_engine_that_shares_tokens_agrees_with_the_reference(reference, dtype, name, groups, max_tokens):
    wanted = reference.score(groups)
    got = ENGINES[name](reference, max_tokens).score(groups)
    assert [len(row) for row in got] == [len(row) for row in groups]
    for want, verdict in zip(chain(*wanted), chain(*got), strict=True):
        assert verdict.risk == pytest.approx(want.risk, abs=TOLERANCE[dtype])
        assert verdict.label_mass == pytest.approx(want.label_mass, abs=TOLERANCE[dtype])


def test_the_models_of_these_tests_tell_prompts_apart(reference):
    risks = [verdict.risk for verdict in reference.score([[[5, 6, cut] for cut in range(10, 30)]])[0]]
    assert max(risks) - min(risks) > 0.2


def counting(engine):
    """The tokens that each forward of the engine's model computes, padding included."""
    model, tokens = engine._model, []
    original = model.forward

    def forward(*args, **kwargs):
        tokens.append(kwargs["input_ids"].numel())
        return original(*args, **kwargs)

    model.forward = forward
    return tokens


PROMPT, RESPONSE, SUFFIX = [*range(8, 18)], [*range(18, 38)], [5, 6, 9]
EXCHANGE = [PROMPT + RESPONSE[:cut] + SUFFIX for cut in (4, 8, 12, 16, 20)]


@pytest.mark.parametrize("name", ENGINES)
def test_every_distinct_token_is_run_once(llama, name, monkeypatch):
    monkeypatch.setattr(llama.model, "forward", llama.model.forward)
    engine = ENGINES[name](llama, 200)
    tokens = counting(engine)
    engine.score([EXCHANGE, EXCHANGE[:2]])
    # 10 of the prompt, 20 of the response, 5 suffixes of 3: 45, where per_prefix runs 50 + 60 + 15 = 125. The
    # cache of kv_fork is filled with the longest prompt but its last token, and the rest runs over it.
    assert tokens == ([45] if name == "one_pass" else [32, 13])


def test_exchanges_of_one_prompt_share_it_in_one_pass(llama, monkeypatch):
    monkeypatch.setattr(llama.model, "forward", llama.model.forward)
    engine = OnePassEngine(llama, 200)
    tokens = counting(engine)
    engine.score([[PROMPT + [20 + i] * 5 + SUFFIX] for i in range(4)])
    assert tokens == [10 + 4 * (5 + 3)]


@pytest.mark.parametrize("name", ENGINES)
def test_no_forward_holds_more_tokens_than_asked_for(llama, name, monkeypatch):
    monkeypatch.setattr(llama.model, "forward", llama.model.forward)
    tokens = counting(ENGINES[name](llama, 20))
    ENGINES[name](llama, 20).score([[[1, 2, 3, *range(4, 4 + i), 7] for i in range(14)]])
    assert len(tokens) > 1
    assert max(tokens) <= 20


@pytest.mark.parametrize("name", ENGINES)
def test_broken_numbers_cost_only_the_prompts_that_hold_them(llama, name):
    import copy

    import torch

    broken = PerPrefixEngine(copy.deepcopy(llama.model), LABELS, 3, CONTEXT)
    with torch.no_grad():
        broken.model.get_input_embeddings().weight[RESPONSE[9]] = float("nan")
    # Token 9 of the response stands after the cuts 4 and 8: masked there, yet 0 times NaN is NaN.
    (verdicts,) = ENGINES[name](broken, 200).score([EXCHANGE])
    (wanted,) = llama.score([EXCHANGE])
    assert [v.risk for v in verdicts[:2]] == pytest.approx([v.risk for v in wanted[:2]], abs=1e-5)
    assert [v.risk for v in verdicts[2:]] == [None] * 3
    assert all("not finite" in v.reason for v in verdicts[2:])


@pytest.mark.parametrize("name", ENGINES)
def test_a_prompt_beyond_the_context_is_unscored_and_its_group_is_not(llama, name):
    [fits, long] = ENGINES[name](llama, 200).score([[[1] * CONTEXT, [1] * (CONTEXT + 1)]])[0]
    assert fits.risk is not None
    assert long.risk is None
    assert long.reason == "the rendered prompt has 65 tokens and the guard reads 64"


@pytest.mark.parametrize("name", ENGINES)
def test_a_prompt_too_long_for_a_forward_is_scored_by_itself(llama, name):
    rows = [[1, *range(5, 35)], [2, *range(5, 35)], [1, 2]]
    (verdicts,) = ENGINES[name](llama, 8).score([rows])
    assert [v.risk for v in verdicts] == pytest.approx([v.risk for v in llama.score([rows])[0]], abs=1e-5)


@pytest.mark.parametrize("name", ENGINES)
def test_no_groups_and_empty_groups_give_nothing(llama, name):
    assert ENGINES[name](llama, 8).score([]) == []
    assert ENGINES[name](llama, 8).score([[], [[1]]])[0] == []
