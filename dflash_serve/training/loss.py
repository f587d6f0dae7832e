"""Cross entropy through the target's frozen output head, in chunks, without keeping the logits."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

CHUNK_TOKENS = 8192
"""Draft slots whose logits exist at a time (8192 x 49152 logits in bfloat16 are 0.8 GB)."""


def slot_weights(block_size: int, gamma: float, device: torch.device) -> Tensor:
    """exp(-(k - 1) / gamma) for slots k = 1 .. block_size - 1, as an early miss costs the later."""
    return torch.exp(-torch.arange(block_size - 1, device=device) / gamma)


class FrozenHeadLoss(torch.autograd.Function):
    """Weighted cross entropy of `hidden @ head.T`. The forward pass takes the gradient too, as the head needs none."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        chunk_loss = _for_device(_chunk_loss, hidden.device.type)
        losses, correct, gradients = [], [], []
        for part in _chunks(len(hidden)):
            loss, right, gradient = chunk_loss(hidden[part], head, labels[part], weights[part])
            losses.append(loss)
            correct.append(right)
            gradients.append(gradient)
        ctx.save_for_backward(torch.cat(gradients))
        result = torch.stack(losses).sum(), torch.cat(correct)
        ctx.mark_non_differentiable(result[1])
        return result

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None, None, None


def head_loss(hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of weight x cross entropy (scalar), and whether each slot's best token is its label.

    Args:
        hidden: [M, hidden]; head: [vocab, hidden], frozen; labels: [M]; weights: [M] float32, zero where not valid.
    """
    loss, correct = FrozenHeadLoss.apply(hidden, head, labels, weights)
    return loss, correct


def head_argmax(hidden: Tensor, head: Tensor) -> Tensor:
    """The best token [M] of each slot."""
    chunk_argmax = _for_device(_chunk_argmax, hidden.device.type)
    return torch.cat([chunk_argmax(hidden[part], head) for part in _chunks(len(hidden))])


def _chunk_loss(hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = (hidden @ head.T).float()
    log_sum = logits.logsumexp(dim=-1)
    loss = ((log_sum - logits.gather(1, labels[:, None]).squeeze(1)) * weights).sum()
    is_label = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
    gradient = (torch.exp(logits - log_sum[:, None]) - is_label.float()) * weights[:, None]
    return loss, logits.argmax(dim=-1) == labels, gradient.to(head.dtype) @ head


def _chunk_argmax(hidden: Tensor, head: Tensor) -> Tensor:
    return (hidden @ head.T).argmax(dim=-1)


@cache
def _for_device(function: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False) if device_type == "cuda" else function


def _chunks(length: int) -> list[slice]:
    """Slices of equal size (save the last), as few as CHUNK_TOKENS allows: one compiled shape if they divide evenly."""
    size = math.ceil(length / math.ceil(length / CHUNK_TOKENS))
    return [slice(low, min(low + size, length)) for low in range(0, length, size)]
