"""The exact KL between two next-token distributions, a few tokens at a time.

    M tokens   H hidden size   V vocabulary

The logits of all tokens, (M, V), are never in memory at once: at most `chunk` rows of them are.
"""

from typing import Any

import torch


def chunked_kl(
    hidden_MH: torch.Tensor,
    head: tuple[torch.Tensor, torch.Tensor | None],
    reference_MH: torch.Tensor,
    reference_head: tuple[torch.Tensor, torch.Tensor | None],
    chunk: int = 128,
    under_reference: bool = False,
) -> torch.Tensor:
    """KL(pi || pi_ref) = sum_v pi(v) (log pi(v) - log pi_ref(v)) of every token, in nats; or KL(pi_ref || pi).

    The logits are `hidden @ weight.T + bias`; the softmax and the sum are taken in fp32.

    Args:
        hidden_MH: the policy's last hidden states.
        head: weight (V, H) and bias (V,) of the policy's output layer.
        reference_MH: the reference's last hidden states; nothing flows back into them or their head.
        reference_head: the same of the reference.
        chunk: tokens whose distributions are in memory at a time; it changes no value beyond rounding.
        under_reference: the mean is under pi_ref: KL(pi_ref || pi) = sum_v pi_ref(v) (log pi_ref(v) - log pi(v)).

    Returns:
        (M,) fp32, at least 0 up to rounding, differentiable in `hidden_MH` and `head`.
    """
    kl_M: torch.Tensor = _ChunkedKL.apply(hidden_MH, *head, reference_MH, *reference_head, chunk, under_reference)
    return kl_M


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _log_softmax(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """(chunk, V) log-probabilities in fp32."""
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)  # logits rounded to bf16 blur a small KL
    else:
        logits = torch.mm(hidden, weight.t())
    if bias is not None:
        logits += bias
    return torch.log_softmax(logits, dim=-1, dtype=torch.float32)


class _ChunkedKL(torch.autograd.Function):
    """d KL(pi || pi_ref) / d logit_v = pi(v) (log pi(v) - log pi_ref(v) - KL); d KL(pi_ref || pi) / d logit_v = pi(v) - pi_ref(v).

    Under a frozen head the gradient of the hidden states, (M, H), is made along with the value and only scaled on the
    way back, so that no logits are computed twice. The gradient of a trained head needs the incoming gradient of each
    token; there the chunks are computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MH: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        reference_MH: torch.Tensor,
        reference_weight: torch.Tensor,
        reference_bias: torch.Tensor | None,
        chunk: int,
        under_reference: bool,
    ) -> torch.Tensor:
        ctx.dtype, ctx.chunk, ctx.under_reference = _compute_dtype(hidden_MH), chunk, under_reference
        ctx.head_is_trained = any(ctx.needs_input_grad[1:3])
        tensors = (hidden_MH, weight, bias, reference_MH, reference_weight, reference_bias)
        kl_M = torch.empty(len(hidden_MH), dtype=torch.float32, device=hidden_MH.device)
        keep_gradient = ctx.needs_input_grad[0] and not ctx.head_is_trained
        gradient_MH = torch.empty_like(hidden_MH) if keep_gradient else None
        with torch.autocast(hidden_MH.device.type, enabled=False):
            cast: list[Any] = [None if tensor is None else tensor.to(ctx.dtype) for tensor in tensors]
            for rows in _chunks(len(hidden_MH), chunk):
                kl_M[rows], slope = _kl_and_slope(cast, rows, under_reference)
                if gradient_MH is not None:
                    gradient_MH[rows] = (slope.to(ctx.dtype) @ cast[1]).to(gradient_MH.dtype)
        ctx.save_for_backward(*(tensors if ctx.head_is_trained else (gradient_MH,)))
        return kl_M

    @staticmethod
    def backward(ctx: Any, *incoming: torch.Tensor) -> tuple[Any, ...]:
        (incoming_M,) = incoming
        if not ctx.head_is_trained:
            (gradient_MH,) = ctx.saved_tensors
            scaled = None if gradient_MH is None else gradient_MH * incoming_M[:, None].to(gradient_MH.dtype)
            return scaled, None, None, None, None, None, None, None
        tensors = ctx.saved_tensors
        hidden_MH, weight, bias = tensors[:3]
        cast: list[Any] = [None if tensor is None else tensor.to(ctx.dtype) for tensor in tensors]
        # Sums over many tokens: in fp32 whatever the inputs are.
        to_hidden = torch.empty_like(hidden_MH)
        to_weight = torch.zeros_like(weight, dtype=torch.float32)
        to_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for rows in _chunks(len(hidden_MH), ctx.chunk):
            _, slope = _kl_and_slope(cast, rows, ctx.under_reference)
            slope *= incoming_M[rows, None]
            to_hidden[rows] = (slope.to(ctx.dtype) @ cast[1]).to(to_hidden.dtype)
            to_weight += (slope.to(ctx.dtype).t() @ cast[0][rows]).float()
            if to_bias is not None:
                to_bias += slope.sum(0)
        return (
            to_hidden,
            to_weight.to(weight.dtype),
            None if to_bias is None else to_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
            None,
        )


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _kl_and_slope(cast: list[Any], rows: slice, under_reference: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(chunk,) KL and (chunk, V) d KL / d logits; works in place, so that three (chunk, V) tensors are the most."""
    hidden, weight, bias, reference, reference_weight, reference_bias = cast
    log_p = _log_softmax(hidden[rows], weight, bias)
    log_q = _log_softmax(reference[rows], reference_weight, reference_bias)
    if under_reference:
        q = log_q.exp()
        kl = torch.linalg.vecdot(q, log_q.sub_(log_p))
        return kl, log_p.exp_().sub_(q)
    gap = log_q.neg_().add_(log_p)
    p = log_p.exp_()
    kl = torch.linalg.vecdot(p, gap)
    return kl, p.mul_(gap.sub_(kl[:, None]))
