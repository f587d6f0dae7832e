"""What the front adds, from pairs with a known answer."""

from __future__ import annotations

from benchmarks.front_hop import REFUSED, table


def test_what_is_added_is_taken_within_each_pair() -> None:
    # the machine gets slower; the front always adds a millisecond
    pairs = [(0.001 * (n + 1), 0.001 * n) for n in range(1, 6)]
    _, line = table({REFUSED: pairs}).splitlines()
    assert line.split()[3:] == ["3.00", "4.00", "+1.00", "+1.00", "to", "+1.00"]
