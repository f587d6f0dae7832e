"""From packed rows to a batch of draft blocks: anchors, positions, labels, and one forward pass for all of them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dflash_serve.training.attention import anchor_mask, document_mask
from dflash_serve.training.data import Rows
from dflash_serve.training.drafter import DFlashDrafter
from dflash_serve.training.target import Target


@dataclass(frozen=True)
class RowBatch:
    """Some packed rows on the device, each [R, C]; see `data.Rows`."""

    tokens: Tensor
    document_start: Tensor
    document_end: Tensor
    is_answer: Tensor

    @classmethod
    def on_device(cls, rows: Rows, device: torch.device) -> "RowBatch":
        """All rows at once (a whole epoch is some hundred MB)."""
        return cls(
            tokens=torch.from_numpy(rows.tokens).to(device),
            document_start=torch.from_numpy(rows.document_start).to(device),
            document_end=torch.from_numpy(rows.document_end).to(device),
            is_answer=torch.from_numpy(rows.is_answer).to(device),
        )

    def select(self, index: Tensor | slice) -> "RowBatch":
        return RowBatch(
            self.tokens[index].long(),
            self.document_start[index].long(),
            self.document_end[index].long(),
            self.is_answer[index],
        )

    def anchor_candidates(self) -> Tensor:
        """[R, C] bool: answer tokens that another follows, so that a block there has something to predict."""
        column = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return self.is_answer & (column + 1 < self.document_end)


def draw_anchors(candidates: Tensor, num_anchors: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw anchors without replacement from candidates [R, C]: (row indices ascending, which of them are real), [R, N].

    A row with fewer candidates than N is filled with other positions, which are not real and must not count.
    """
    scores = torch.rand(candidates.shape, device=candidates.device, generator=generator)
    anchors = torch.where(candidates, scores, scores - 1).topk(num_anchors, dim=1).indices.sort(dim=1).values
    return anchors, candidates.gather(1, anchors)


def block_labels(rows: RowBatch, anchors: Tensor, real: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """(labels, valid) of the draft slots: [R, N, block_size - 1]; slot k's label is the token k after the anchor.

    Slots beyond the end of the anchor's document, and slots of anchors that are not real, are not valid.
    """
    length = rows.tokens.shape[1]
    at = anchors[..., None] + torch.arange(1, block_size, device=anchors.device)
    valid = (at < rows.document_end.gather(1, anchors)[..., None]) & real[..., None]
    labels = rows.tokens.gather(1, at.clamp_max(length - 1).flatten(1)).view(at.shape)
    return labels, valid


@torch.no_grad()
def context_features(target: Target, rows: RowBatch, layer_ids: tuple[int, ...], use_tiles: bool) -> Tensor:
    """The target's hidden states of every token: [R, C, len(layer_ids) * hidden]."""
    mask = document_mask(rows.document_start, use_tiles)
    return target.features(rows.tokens, positions(rows), mask, layer_ids)


def positions(rows: RowBatch) -> Tensor:
    """[R, C], each token's position in its document."""
    return torch.arange(rows.tokens.shape[1], device=rows.tokens.device) - rows.document_start


def draft(
    target: Target,
    drafter: DFlashDrafter,
    rows: RowBatch,
    features: Tensor,
    anchors: Tensor,
    block_size: int,
    use_tiles: bool,
) -> Tensor:
    """Final hidden states of the draft slots of all anchors: [R, N, block_size - 1, hidden]."""
    num_rows, num_anchors = anchors.shape
    start = rows.document_start.gather(1, anchors)
    mask = anchor_mask(anchors, start, rows.tokens.shape[1], block_size, use_tiles)
    block_positions = (anchors - start)[..., None] + torch.arange(block_size, device=anchors.device)
    tokens = torch.full_like(block_positions, drafter.config.mask_token_id)
    tokens[..., 0] = rows.tokens.gather(1, anchors)
    block = F.embedding(tokens.flatten(1), target.embedding)
    hidden = drafter(features, positions(rows), block, block_positions.flatten(1), mask)
    return hidden.view(num_rows, num_anchors, block_size, -1)[:, :, 1:]
