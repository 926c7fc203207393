"""Numbers and identities of the likelihood objectives."""

import torch

from preftune import objectives as o


def test_nll_by_hand() -> None:
    """-(-2) = 2 and -(-0.5) = 0.5."""
    assert o.nll(torch.tensor([-2.0, -0.5])).tolist() == [2.0, 0.5]


def test_weighted_nll_by_hand() -> None:
    """Weights 3, 0, -0.5 on log-probs -2, -1, -4: 3·2 = 6, 0·1 = 0, -0.5·4 = -2."""
    loss = o.weighted_nll(torch.tensor([-2.0, -1.0, -4.0]), torch.tensor([3.0, 0.0, -0.5]))
    assert loss.tolist() == [6.0, 0.0, -2.0]


def test_weight_one_is_nll() -> None:
    logp = torch.randn(8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(o.weighted_nll(logp, torch.ones(8)), o.nll(logp))


def test_nll_on_data_is_the_forward_kl_gradient() -> None:
    """With data drawn from q, the descent direction on the logits of a softmax p is q - p.

    Enumerated over arms with q = (0.7, 0.2, 0.1) and p uniform: q - p = (0.3667, -0.1333, -0.2333).
    """
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    (q * o.nll(logits.log_softmax(-1))).sum().backward()
    expected = torch.tensor([0.7 - 1 / 3, 0.2 - 1 / 3, 0.1 - 1 / 3], dtype=torch.float64)
    assert logits.grad is not None
    torch.testing.assert_close(-logits.grad, expected, rtol=0, atol=1e-12)
