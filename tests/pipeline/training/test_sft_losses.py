"""What a target token weighs, by hand."""

import pytest
import torch

from ballast.pipeline.training.sft_losses import constrained_beta, constrained_weight, k2, shaped_log_prob, with_floor


def test_weight_and_kl_make_the_published_loss():
    # s = .8, CE = 2, KL = .5, lambda .5: .8 * 2 + .5 * .2 * .5 = 1.65
    shaped = shaped_log_prob(torch.tensor([-2.0]), torch.tensor([0.8]), torch.tensor([0.5]), torch.tensor([0.5 * 0.2]))
    assert -shaped.item() == pytest.approx(1.65, abs=1e-6)


def test_k2_is_half_the_squared_difference_of_log_probs():
    # .5 * (-1 - -3)^2 = 2
    assert k2(torch.tensor([-1.0]), torch.tensor([-3.0])).item() == pytest.approx(2.0, abs=1e-6)


def test_at_and_above_the_floor_text_is_wholly_safe_and_below_nothing_changes():
    star = torch.tensor([[0.95, 0.9, 0.89, 0.0, 1.0]])
    assert with_floor(star, 0.9).tolist() == [[1.0, 1.0, pytest.approx(0.89), 0.0, 1.0]]
    assert torch.equal(with_floor(star, 1.0), star)


def test_beta_follows_the_place_in_the_answer_and_not_in_the_row():
    target = torch.tensor([[False, True, True, True, True, True, True, True], [True, False, True] + [False] * 5])
    beta = constrained_beta(target, 0.5, 2.0, 0.1)
    assert beta[0, 1:].tolist() == pytest.approx([0.5, 2.0, 2.0, 2.0, 2.0, 0.1, 0.1])
    assert beta[1, [0, 2]].tolist() == pytest.approx([0.5, 2.0])


def test_constrained_weights_by_hand():
    # 2 (1 - sigmoid(beta * gap)): gap 0 gives 1; beta .5 and gap ln 9 give sigmoid(ln 3) = 3/4, so .5; beta 2 and gap
    # -ln(3)/2 give sigmoid(-ln 3) = 1/4, so 1.5
    log_prob = torch.tensor([[-1.0, -1.0, -2.0]], requires_grad=True)
    reference = torch.tensor([[-1.0, -1.0 - 2.1972246, -2.0 + 0.5493061]])
    weight = constrained_weight(log_prob, reference, torch.tensor([[2.0, 0.5, 2.0]]))
    assert weight.tolist() == [pytest.approx([1.0, 0.5, 1.5], abs=1e-6)]
    assert not weight.requires_grad
