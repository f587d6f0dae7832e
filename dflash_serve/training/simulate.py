"""Acceptance without serving: what the drafter would have drafted at every answer position, and a server's walk.

A greedy server accepts the drafter's longest prefix that equals the target's own answer. So, with the answer known, one
packed forward pass that takes every answer position as an anchor tells all that a server would measure. A server that
drafts K tokens runs blocks of K + 1, so each K has a pass of its own.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from dflash_serve.training.blocks import RowBatch, block_labels, context_features, draft
from dflash_serve.training.data import Corpus, pack_rows
from dflash_serve.training.drafter import DFlashDrafter
from dflash_serve.training.loss import head_argmax
from dflash_serve.training.target import Target

Matches = Sequence[int] | NDArray[np.int64]
"""For every answer token that another follows: how many draft tokens after it equal the answer."""


@dataclass(frozen=True)
class Acceptance:
    """Counts over the verifications of one or many answers, at one number of draft tokens.

    Attributes:
        verifications: how often the target verified a draft.
        accepted_at: [num_draft_tokens], verifications that accepted the draft token at each place.
    """

    verifications: int
    accepted_at: tuple[int, ...]

    @property
    def acceptance_length(self) -> float:
        """Tokens per verification, the bonus token included."""
        return 1.0 + sum(self.accepted_at) / max(self.verifications, 1)

    @property
    def rates(self) -> list[float]:
        """Share of verifications that accepted the draft token at each place."""
        return [count / max(self.verifications, 1) for count in self.accepted_at]

    def to_json(self) -> dict[str, Any]:
        return {
            "acceptance_length": round(self.acceptance_length, 4),
            "verifications": self.verifications,
            "rates": [round(rate, 4) for rate in self.rates],
        }


def walk(matches: Matches, num_draft_tokens: int) -> list[int]:
    """Draft tokens accepted at each verification of one answer.

    The first answer token comes from the prefill and is the first bonus token. Each verification moves on by its
    accepted tokens and one bonus token more.
    """
    accepted = []
    position = 0
    while position < len(matches):
        accepted.append(min(int(matches[position]), num_draft_tokens))
        position += accepted[-1] + 1
    return accepted


def acceptance(answers: Iterable[Matches], num_draft_tokens: int) -> Acceptance:
    """Pool the walks of many answers' `matches`."""
    accepted = np.array([count for matches in answers for count in walk(matches, num_draft_tokens)], dtype=np.int64)
    at = tuple(int((accepted > place).sum()) for place in range(num_draft_tokens))
    return Acceptance(verifications=len(accepted), accepted_at=at)


def match_lengths(
    target: Target,
    drafter: DFlashDrafter,
    corpus: Corpus,
    documents: Sequence[int],
    *,
    block_size: int,
    row_length: int,
    anchors_per_row: int,
    rows_per_pass: int,
    use_tiles: bool,
) -> list[NDArray[np.int64]]:
    """For each document, its `Matches`.

    Shapes are those of training, so that compiled code is used again.
    """
    too_long = [int(i) for i in documents if corpus.lengths[i] > row_length]
    if too_long:
        raise ValueError(
            f"row_length: {row_length} is shorter than document {too_long[0]} ({corpus.lengths[too_long[0]]} tokens)"
        )
    rows = pack_rows(corpus, documents, row_length, multiple_of=rows_per_pass)
    resident = RowBatch.on_device(rows, target.device)
    found = np.full(rows.tokens.shape, -1, dtype=np.int64)
    for low in range(0, len(rows), rows_per_pass):
        batch = resident.select(slice(low, low + rows_per_pass))
        features = context_features(target, batch, drafter.config.target_layer_ids, use_tiles)
        candidates = batch.anchor_candidates()
        # Candidates first and in order; what follows them only fills the last pass up and is left out below.
        order = torch.argsort((~candidates).to(torch.int8), dim=1, stable=True)
        for first in range(0, int(candidates.sum(dim=1).max()), anchors_per_row):
            anchors = order[:, first : first + anchors_per_row]
            anchors = F.pad(anchors, (0, anchors_per_row - anchors.shape[1])).sort(dim=1).values
            real = candidates.gather(1, anchors)
            matches = _block_matches(target, drafter, batch, features, anchors, real, block_size, use_tiles)
            row, place = torch.nonzero(real, as_tuple=True)
            found[low + row.cpu().numpy(), anchors[row, place].cpu().numpy()] = matches[row, place].cpu().numpy()
    is_anchor = found >= 0
    # Packing keeps the documents' order, so the values of one document follow each other.
    counts = np.bincount(rows.document[is_anchor], minlength=len(corpus))[list(documents)]
    return np.split(found[is_anchor], np.cumsum(counts)[:-1])


def _block_matches(
    target: Target,
    drafter: DFlashDrafter,
    batch: RowBatch,
    features: torch.Tensor,
    anchors: torch.Tensor,
    real: torch.Tensor,
    block_size: int,
    use_tiles: bool,
) -> torch.Tensor:
    """[R, N], the draft tokens of each block that match the answer, counted from its start."""
    # Gradients stay on though unused: the compiled layers of training then serve here too, with no second compilation.
    hidden = draft(target, drafter, batch, features, anchors, block_size, use_tiles).detach()
    labels, valid = block_labels(batch, anchors, real, block_size)
    tokens = head_argmax(hidden.flatten(0, 2), target.head).view(labels.shape)
    return ((tokens == labels) & valid).long().cumprod(dim=-1).sum(dim=-1)


def acceptance_by_task(
    corpus: Corpus, documents: Sequence[int], matches: Sequence[Matches], num_draft_tokens: int
) -> dict[str, Acceptance]:
    """Task -> acceptance; "all" pools every document."""
    groups: dict[str, list[Matches]] = {}
    for document, found in zip(documents, matches, strict=True):
        groups.setdefault(str(corpus.tasks[document]), []).append(found)
    groups = dict(sorted(groups.items())) | {"all": list(matches)}
    return {task: acceptance(found, num_draft_tokens) for task, found in groups.items()}
