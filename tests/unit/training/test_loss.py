import pytest
import torch
import torch.nn.functional as F

from dflash_serve.training import loss as loss_module
from dflash_serve.training.loss import head_argmax, head_loss, slot_weights


def test_loss_and_gradient_equal_plain_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 16)
    torch.manual_seed(0)
    hidden = torch.randn(50, 12, requires_grad=True)
    head, labels, weights = torch.randn(40, 12), torch.randint(40, (50,)), torch.rand(50)
    weights[::7] = 0
    loss, correct = head_loss(hidden, head, labels, weights)
    (3 * loss).backward()
    plain = hidden.detach().clone().requires_grad_()
    expected = (F.cross_entropy(plain @ head.T, labels, reduction="none") * weights).sum()
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(hidden.grad, plain.grad)
    best = (plain @ head.T).argmax(dim=-1)
    assert correct.tolist() == (best == labels).tolist()
    assert head_argmax(hidden.detach(), head).tolist() == best.tolist()


def test_weights_fall_by_e_over_gamma_slots() -> None:
    weights = slot_weights(16, 7.0, torch.device("cpu"))
    assert len(weights) == 15
    assert weights[0] == 1
    assert weights[7] == pytest.approx(0.36788, abs=1e-5)
