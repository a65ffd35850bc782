"""The exact KL in chunks is the dense one, in value and gradient, and its memory does not grow with the tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ballast.pipeline.training import chunked_kl as module
from ballast.pipeline.training.chunked_kl import chunked_kl


def dense(hidden, head, reference, reference_head, under_reference=False):
    weight, bias = head
    log_p = torch.log_softmax(hidden @ weight.T + (0 if bias is None else bias), dim=-1)
    weight, bias = reference_head
    log_q = torch.log_softmax(reference @ weight.T + (0 if bias is None else bias), dim=-1)
    if under_reference:
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def test_the_mean_under_the_reference_by_hand():
    # the same two words: KL(pi_ref || pi) = 1/2 ln(2) + 1/2 ln(2/3) = 0.346574 - 0.202733 = 0.143841
    head = (torch.eye(2), None)
    kl = chunked_kl(torch.tensor([[0.0, 1.0986123]]), head, torch.zeros(1, 2), head, under_reference=True)
    assert kl.item() == pytest.approx(0.143841, abs=1e-6)


def drawn(tokens, bias, seed=0):
    torch.manual_seed(seed)
    hidden, reference = torch.randn(tokens, 6), torch.randn(tokens, 6)
    head = (torch.randn(17, 6), torch.randn(17) if bias else None)
    other = (torch.randn(17, 6), torch.randn(17) if bias else None)
    return hidden, head, reference, other


def test_two_words_by_hand():
    # logits (0, ln 3): pi = (1/4, 3/4); the reference's (0, 0): (1/2, 1/2)
    # KL = 1/4 ln(1/2) + 3/4 ln(3/2) = -0.173287 + 0.304099 = 0.130812
    head = (torch.eye(2), None)
    kl = chunked_kl(torch.tensor([[0.0, 1.0986123]]), head, torch.zeros(1, 2), head)
    assert kl.item() == pytest.approx(0.130812, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(1, 9),
    chunk=st.integers(1, 10),
    bias=st.booleans(),
    trained=st.booleans(),
    under=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_chunk_gives_the_dense_value_and_gradients(tokens, chunk, bias, trained, under, seed):
    hidden, head, reference, other = drawn(tokens, bias, seed)
    leaves = [hidden, *([t for t in head if t is not None] if trained else [])]
    for leaf in leaves:
        leaf.requires_grad_()
    incoming = torch.randn(tokens)  # tokens weigh differently
    expected = dense(hidden, head, reference, other, under)
    wanted = torch.autograd.grad((expected * incoming).sum(), leaves)
    kl = chunked_kl(hidden, head, reference, other, chunk, under)
    assert torch.allclose(kl, expected, atol=1e-5)
    for mine, theirs in zip(torch.autograd.grad((kl * incoming).sum(), leaves), wanted, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_no_more_than_a_chunk_of_logits_is_made_at_a_time(monkeypatch):
    sizes = []
    original = module._log_softmax

    def spy(hidden, weight, bias):
        sizes.append(len(hidden))
        return original(hidden, weight, bias)

    monkeypatch.setattr(module, "_log_softmax", spy)
    hidden, head, reference, other = drawn(11, bias=False)
    chunked_kl(hidden.requires_grad_(), head, reference, other, chunk=4).sum().backward()
    assert sizes == [4, 4, 4, 4, 3, 3]  # policy and reference, and none again on the way back


def test_the_same_distribution_has_no_kl_and_no_gradient():
    hidden, head, _, _ = drawn(3, bias=True)
    kl = chunked_kl(hidden.requires_grad_(), head, hidden.detach(), head)
    kl.sum().backward()
    assert kl.abs().max() < 1e-6
    assert hidden.grad.abs().max() < 1e-6


def test_bfloat16_stays_near_float32():
    hidden, head, reference, other = drawn(8, bias=False)
    exact = chunked_kl(hidden, head, reference, other)
    half = [t.bfloat16() for t in (hidden, head[0], reference, other[0])]
    kl = chunked_kl(half[0], (half[1], None), half[2], (half[3], None))
    assert kl.dtype == torch.float32
    assert torch.allclose(kl, exact, rtol=0.05, atol=0.05)
