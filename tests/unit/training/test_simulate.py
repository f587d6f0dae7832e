import numpy as np
import torch

from dflash_serve.training.blocks import RowBatch, context_features
from dflash_serve.training.data import pack_rows
from dflash_serve.training.drafter import DFlashDrafter
from dflash_serve.training.reference import draft_block
from dflash_serve.training.simulate import acceptance, acceptance_by_task, match_lengths, walk
from dflash_serve.training.target import Target
from tests.unit.training.conftest import CPU
from tests.unit.training.test_blocks import corpus_of


def test_walk_moves_on_by_accepted_tokens_and_one_bonus_token() -> None:
    #          at: 0  1  2  3  4  5  6
    matches = [2, 0, 5, 1, 0, 0, 3]
    assert walk(matches, 15) == [2, 1, 0, 3]  # at 0, 3, 5, 6
    assert walk(matches, 1) == [1, 1, 0, 0, 1]  # at 0, 2, 4, 5, 6
    assert walk([], 7) == []


def test_acceptance_counts_the_bonus_token() -> None:
    result = acceptance([[2, 0, 5, 1, 0, 0, 3]], 3)
    assert result.verifications == 4
    assert result.accepted_at == (3, 2, 1)
    assert result.acceptance_length == 1 + 6 / 4
    assert result.rates == [0.75, 0.5, 0.25]


def test_a_perfect_drafter_accepts_everything_and_a_useless_one_nothing() -> None:
    length = 64  # answer tokens after the first
    perfect = [min(15, length - i) for i in range(length)]
    assert acceptance([perfect], 15).acceptance_length == 16  # 64 = 4 x (15 + 1)
    assert acceptance([[0] * length], 15).acceptance_length == 1


def test_by_task_pools_answers() -> None:
    corpus = corpus_of((1, 3), (1, 3))
    corpus.tasks[:] = ["math", "code"]
    result = acceptance_by_task(corpus, [0, 1], [[2, 1], [0, 0]], 2)
    assert list(result) == ["code", "math", "all"]
    assert result["math"].acceptance_length == 3
    assert result["all"].verifications == 3


def test_match_lengths_are_those_of_drafting_block_by_block(target: Target, drafter: DFlashDrafter) -> None:
    corpus = corpus_of((3, 20), (9, 2), (5, 1), (1, 30))
    # An answer that the drafter gets right for a while: write its own drafts into document 0.
    rows = pack_rows(corpus, [0], 64)
    batch = RowBatch.on_device(rows, CPU).select(slice(None))
    layer_ids = drafter.config.target_layer_ids
    features = context_features(target, batch, layer_ids, use_tiles=False)[0]
    drafts = draft_block(drafter, target.embedding, target.head, features[:7], int(corpus.tokens[7])).argmax(dim=-1)
    corpus.tokens[8:11] = drafts[:3].numpy()

    documents = [3, 0, 2, 1]
    found = match_lengths(
        target,
        drafter,
        corpus,
        documents,
        block_size=drafter.config.block_size,
        row_length=48,
        anchors_per_row=8,
        rows_per_pass=3,
        use_tiles=False,
    )
    assert [len(f) for f in found] == [29, 19, 0, 1]
    for document, matches in zip(documents, found, strict=True):
        tokens = torch.tensor(corpus.tokens[corpus.offsets[document] : corpus.offsets[document + 1]].astype(np.int64))
        rows = pack_rows(corpus, [document], 48)
        batch = RowBatch.on_device(rows, CPU).select(slice(None))
        features = context_features(target, batch, layer_ids, use_tiles=False)[0]
        prompt_length = int(corpus.prompt_lengths[document])
        for i, match in enumerate(matches.tolist()):
            at = prompt_length + i
            logits = draft_block(drafter, target.embedding, target.head, features[:at], int(tokens[at]))
            expected = 0
            for drafted, label in zip(logits.argmax(dim=-1).tolist(), tokens[at + 1 :].tolist(), strict=False):
                if drafted != label:
                    break
                expected += 1
            assert match == expected, (document, i)
    assert found[1][4] >= 3
