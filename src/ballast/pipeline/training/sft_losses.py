"""The arithmetic of shaped SFT: what a target token weighs, and what holds it near the reference.

    B rows   T positions (the token at t is predicted from those before it)

The loss of a token is `weight * CE + kl_weight * (1 - s) * KL`, with CE = -log pi(y_t). TRL sums it over the target
tokens and divides by their number in the whole optimizer step. Masks are True at target tokens.
"""

import torch


def with_floor(star_BT: torch.Tensor, floor: float) -> torch.Tensor:
    """STAR with everything at or above `floor` counted as exactly 1, so that benign text is learnt in full.

    A guard gives ordinary text a little less than 1, and without a floor that little leaks its loss away.
    """
    return torch.where(star_BT >= floor, torch.ones_like(star_BT), star_BT)


def k2(log_prob_BT: torch.Tensor, reference_BT: torch.Tensor) -> torch.Tensor:
    """0.5 (log pi(y_t) - log pi_ref(y_t))^2 on the label token: the published stand-in for the KL.

    Unbiased in its gradient only on tokens that pi itself sampled; on tokens of a data set it is a penalty on the
    label's log-prob. Differentiable in `log_prob_BT`.
    """
    return 0.5 * (log_prob_BT - reference_BT) ** 2


def shaped_log_prob(
    log_prob_BT: torch.Tensor, weight_BT: torch.Tensor, kl_BT: torch.Tensor, kl_weight_BT: torch.Tensor
) -> torch.Tensor:
    """What stands in TRL's sum for `log pi(y_t)`: its negative is `weight * CE + kl_weight * KL`.

    With weight 1 and KL weight 0 it is `log_prob_BT` bit for bit, and so are its gradients.
    """
    return log_prob_BT * weight_BT - kl_BT * kl_weight_BT


def constrained_beta(
    target_mask_BT: torch.Tensor, beta_first: float, beta_early: float, beta_later: float
) -> torch.Tensor:
    """(B, T) beta_t by the place of a token in its answer: the first, the second to fifth, and the rest."""
    place_BT = target_mask_BT.long().cumsum(dim=1)  # 1 at the first target token
    later_BT = torch.full(place_BT.shape, beta_later, dtype=torch.float32, device=place_BT.device)
    return later_BT.masked_fill(place_BT <= 5, beta_early).masked_fill(place_BT <= 1, beta_first)


def constrained_weight(log_prob_BT: torch.Tensor, reference_BT: torch.Tensor, beta_BT: torch.Tensor) -> torch.Tensor:
    """2 (1 - sigmoid(beta_t (log pi - log pi_ref))), without gradient (Qi et al. 2024, arXiv 2406.05946, eq. 3).

    As a weight of CE it has the gradient of their objective -(2 / beta_t) log sigmoid(beta_t (log pi - log pi_ref)).
    1 where policy and reference agree, towards 0 where the policy has become surer than the reference, in [0, 2].
    """
    gap_BT = (log_prob_BT - reference_BT).detach()
    return 2.0 * torch.sigmoid(-beta_BT * gap_BT)
