import pytest

from dflash_serve.speculation.acceptance import AcceptanceCounts, AcceptanceWindow


def test_acceptance_length_counts_the_bonus_token() -> None:
    counts = AcceptanceCounts()
    counts.add(verifications=4, draft_tokens=28, accepted_tokens=10, per_position=[4, 3, 2, 1])
    assert counts.acceptance_length == pytest.approx(3.5)
    assert counts.accepted_per_position == [4, 3, 2, 1]


def test_nothing_verified_has_no_acceptance_length() -> None:
    assert AcceptanceCounts().acceptance_length is None


def test_everything_rejected_is_one_token_per_verification() -> None:
    counts = AcceptanceCounts()
    counts.add(verifications=3, draft_tokens=21, accepted_tokens=0, per_position=[0] * 7)
    assert counts.acceptance_length == 1


def test_window_forgets_what_is_older() -> None:
    window = AcceptanceWindow(window_seconds=10)
    window.add(0.0, verifications=1, draft_tokens=7, accepted_tokens=7)
    window.add(8.0, verifications=1, draft_tokens=7, accepted_tokens=1)
    assert window.counts(9.0).acceptance_length == pytest.approx(5)
    assert window.counts(11.0).acceptance_length == pytest.approx(2)
    assert window.counts(30.0).acceptance_length is None


def test_window_memory_does_not_grow_with_the_step_rate() -> None:
    window = AcceptanceWindow(window_seconds=60)
    for step in range(100_000):
        window.add(step / 1000, verifications=1, draft_tokens=7, accepted_tokens=2)
    assert len(window._buckets) <= 62
    assert window.counts(100.0).acceptance_length == pytest.approx(3)


def test_positions_of_different_lengths_add_up() -> None:
    window = AcceptanceWindow(window_seconds=60)
    window.add(0.0, 1, 3, 3, [1, 1, 1])
    window.add(0.1, 1, 7, 1, [1, 0, 0, 0, 0, 0, 0])
    assert window.counts(0.2).accepted_per_position == [2, 1, 1, 0, 0, 0, 0]


def test_what_was_drafted_at_each_position_is_counted_beside() -> None:
    counts = AcceptanceCounts()
    counts.add(2, 10, 4, [2, 1, 1, 0, 0], [2, 2, 2, 2, 2])
    counts.add(1, 2, 1, [1, 0], [1, 1])
    assert counts.drafted_per_position == [3, 3, 2, 2, 2]
    assert counts.accepted_per_position == [3, 1, 1, 0, 0]


def test_a_window_shorter_than_a_bucket_is_refused() -> None:
    with pytest.raises(ValueError, match="window_seconds must be at least"):
        AcceptanceWindow(0.5)
