"""How far the last token's representations of harmful and harmless prompts part, layer by layer.

    L layers   N prompts   H hidden size

gap(l) = E angle(harmless, harmful) - E angle(harmless, harmless), in radians (arXiv 2408.17003, section 3).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ballast.pipeline.localization.bands import Curve


def last_token_states(model: Any, prompt_ids: Sequence[Sequence[int]], batch_size: int, pad: int = 0) -> np.ndarray:
    """(L, N, H) what every decoder layer hands on at the last token of each prompt, in fp32."""
    import torch

    from ballast.pipeline.training.layers import decoder_layers, hidden_of

    layers = decoder_layers(model)
    found: list[list[Any]] = [[] for _ in layers]
    hooks = [
        layer.register_forward_hook(
            lambda module, args, output, own=own: own.append(hidden_of(output)[:, -1].float().cpu())
        )
        for layer, own in zip(layers, found, strict=True)
    ]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(prompt_ids), batch_size):
                model(
                    **left_padded(model, prompt_ids[start : start + batch_size], pad), use_cache=False, logits_to_keep=1
                )
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return np.stack([torch.cat(own).numpy() for own in found])


def left_padded(model: Any, rows: Sequence[Sequence[int]], pad: int) -> dict[str, Any]:
    """Inputs of a batch whose rows end together, with the positions that each row has alone."""
    import torch

    width = max(len(row) for row in rows)
    device = next(model.parameters()).device
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def gap_curve(
    harmless_LNH: np.ndarray, harmful_LNH: np.ndarray, pairs: int = 500, replicates: int = 200, seed: int = 0
) -> Curve:
    """The gap of every layer with a 95% band over draws of prompts, and of pairs among them.

    Args:
        harmless_LNH: states of at least two harmless prompts.
        harmful_LNH: states of harmful prompts.
        pairs: random pairs behind each mean angle.
        replicates: bootstrap draws. Prompts are drawn, since pairs share them and are not independent.
        seed: of all draws.
    """
    generator = np.random.default_rng(seed)
    same, apart = _angles(harmless_LNH, harmless_LNH), _angles(harmless_LNH, harmful_LNH)
    n, m = apart.shape[1:]
    value = _gap(same, apart, np.arange(n), np.arange(m), pairs, generator)
    draws = np.stack(
        [
            _gap(same, apart, generator.integers(0, n, n), generator.integers(0, m, m), pairs, generator)
            for _ in range(replicates)
        ]
    )
    low, high = np.nanquantile(draws, (0.025, 0.975), axis=0)
    return Curve(tuple(value.tolist()), tuple(low.tolist()), tuple(high.tolist()))


def _angles(one_LNH: np.ndarray, other_LMH: np.ndarray) -> np.ndarray:
    """(L, N, M) angles in radians."""
    one, other = (
        states.astype(np.float64) / np.linalg.norm(states.astype(np.float64), axis=-1, keepdims=True)
        for states in (one_LNH, other_LMH)
    )
    return np.asarray(np.arccos(np.clip(one @ other.transpose(0, 2, 1), -1.0, 1.0)))


def _gap(same: np.ndarray, apart: np.ndarray, rows: Any, columns: Any, pairs: int, generator: Any) -> np.ndarray:
    left, right = generator.choice(rows, pairs), generator.choice(rows, pairs)
    different = left != right  # a prompt with itself, twice in a draw, has no angle
    if not different.any():  # a draw of one prompt alone, possible where there are very few
        return np.full(len(same), np.nan)
    across = apart[:, generator.choice(rows, pairs), generator.choice(columns, pairs)].mean(axis=1)
    return np.asarray(across - same[:, left[different], right[different]].mean(axis=1))
