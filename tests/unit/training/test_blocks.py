"""The packed training forward against one block at a time, and the labels."""

import numpy as np
import torch

from dflash_serve.training.blocks import RowBatch, block_labels, context_features, draft, draw_anchors
from dflash_serve.training.data import Corpus, pack_rows
from dflash_serve.training.drafter import DFlashDrafter
from dflash_serve.training.reference import draft_block
from dflash_serve.training.target import Target
from tests.unit.training.conftest import CPU


def corpus_of(*documents: tuple[int, int]) -> Corpus:
    """Random documents, given as (prompt length, answer length)."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(64, size=p).tolist() for p, _ in documents]
    answers = [rng.integers(64, size=a).tolist() for _, a in documents]
    return Corpus.build(prompts, answers, [True] * len(documents), ["task"] * len(documents), 64)


def batch_of(corpus: Corpus, row_length: int) -> RowBatch:
    rows = pack_rows(corpus, range(len(corpus)), row_length)
    return RowBatch.on_device(rows, CPU).select(slice(None))


def test_packed_blocks_equal_single_blocks(target: Target, drafter: DFlashDrafter) -> None:
    corpus = corpus_of((3, 20), (9, 12), (1, 30))
    rows = batch_of(corpus, 64)  # two rows: documents 0 and 1, then 2
    generator = torch.Generator().manual_seed(0)
    anchors, real = draw_anchors(rows.anchor_candidates(), 12, generator)
    assert real.all()
    features = context_features(target, rows, drafter.config.target_layer_ids, use_tiles=False)
    hidden = draft(target, drafter, rows, features, anchors, drafter.config.block_size, use_tiles=False)
    logits = hidden @ target.head.T
    for row in range(2):
        for n, anchor in enumerate(anchors[row].tolist()):
            start = int(rows.document_start[row, anchor])
            expected = draft_block(
                drafter, target.embedding, target.head, features[row, start:anchor], int(rows.tokens[row, anchor])
            )
            torch.testing.assert_close(logits[row, n].double(), expected, rtol=1e-3, atol=1e-3)


def test_labels_end_with_the_document() -> None:
    corpus = corpus_of((2, 4), (3, 9))
    rows = batch_of(corpus, 16)
    anchors = torch.tensor([[2, 4, 10]])
    labels, valid = block_labels(rows, anchors, torch.tensor([[True, True, False]]), block_size=6)
    tokens = corpus.tokens.tolist()
    assert labels[0, 0, :3].tolist() == tokens[3:6]  # the answer's last token (its end-of-sequence) is a label
    assert valid[0].tolist() == [[True, True, True, False, False], [True] + [False] * 4, [False] * 5]


def test_anchors_are_answer_tokens_that_another_follows() -> None:
    rows = batch_of(corpus_of((2, 4), (3, 1), (1, 5)), 24)
    candidates = torch.nonzero(rows.anchor_candidates()[0]).squeeze(1).tolist()
    assert candidates == [2, 3, 4, 11, 12, 13, 14]  # not 5 and 15 (last tokens), not 9 (an answer of one token)
    anchors, real = draw_anchors(rows.anchor_candidates(), 7, torch.Generator().manual_seed(0))
    assert anchors[0].tolist() == candidates
    assert real.all()
    anchors, real = draw_anchors(rows.anchor_candidates(), 9, torch.Generator().manual_seed(0))
    assert sorted(anchors[0].tolist()) == anchors[0].tolist()
    assert int(real.sum()) == 7


def test_drawing_is_uniform_over_candidates() -> None:
    rows = batch_of(corpus_of((2, 30), (10, 40)), 96)
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(96)
    for _ in range(2000):
        anchors, _ = draw_anchors(rows.anchor_candidates(), 8, generator)
        counts[anchors[0]] += 1
    candidates = rows.anchor_candidates()[0]
    assert counts[~candidates].sum() == 0
    share = counts[candidates] / counts.sum() * candidates.sum()
    assert share.min() > 0.8
    assert share.max() < 1.2
