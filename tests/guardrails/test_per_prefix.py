"""The reference engine on a model whose positions are absolute: padding must not shift them."""

import pytest

from ballast.guardrails.engines.interface import Labels
from ballast.guardrails.engines.per_prefix import PerPrefixEngine

SAFE, UNSAFE = [3, 4], [7]


@pytest.fixture(scope="module")
def absolute_position_model():
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)
    return GPT2LMHeadModel(config).eval()


def engine(model, **settings):
    return PerPrefixEngine(model, Labels(tuple(SAFE), tuple(UNSAFE)), **{"batch_size": 8, "context": 16, **settings})


def test_a_padded_row_keeps_its_own_positions(absolute_position_model):
    import torch

    rows = [[5, 6, 9], [1, 2, 3, 4, 5], [8, 8, 8, 8, 8, 8]]
    for row, verdict in zip(rows, engine(absolute_position_model).score([rows])[0], strict=True):
        p = absolute_position_model(torch.tensor([row])).logits[0, -1].double().softmax(-1)
        mass = (p[SAFE].sum() + p[UNSAFE].sum()).item()
        assert verdict.risk == pytest.approx(p[UNSAFE].sum().item() / mass, abs=1e-5)
        assert verdict.label_mass == pytest.approx(mass, abs=1e-5)


def test_verdicts_come_back_in_the_order_of_the_rows_whatever_the_batches(absolute_position_model):
    rows = [[1] * 9, [2], [1] * 9, [5, 6], [2]]
    whole = engine(absolute_position_model).score([rows])[0]
    alone = [engine(absolute_position_model, batch_size=1).score([[row]])[0][0] for row in rows]
    assert [v.risk for v in whole] == pytest.approx([v.risk for v in alone], abs=1e-5)
    assert engine(absolute_position_model).score([]) == []


def test_a_row_of_exactly_the_context_is_scored_and_one_more_token_is_not(absolute_position_model):
    [fits, too_long] = engine(absolute_position_model).score([[[1] * 16, [1] * 17]])[0]
    assert fits.risk is not None
    assert (too_long.risk, too_long.label_mass) == (None, None)
    assert too_long.reason == "the rendered prompt has 17 tokens and the guard reads 16"
