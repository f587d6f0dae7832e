"""How a replica is chosen, and how loaded each is as far as a router can know: what it last reported plus what was sent
since."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Set
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

LOAD_AWARE = "load_aware"
"""The `routing.policy` that there is: the replica with the fewest requests in flight."""

IN_FLIGHT = "dflash_in_flight"
"""Routing stat: requests in flight at the replica when it reported."""
REPORT_NUMBER = "dflash_report"
"""Routing stat: counts up with every report, so that a router can tell a new report from an old one."""


@dataclass
class _Load:
    report_number: int = -1
    reported: int = 0
    sent_since: int = 0


class LoadBook(Generic[Key]):
    """One router's view of its replicas."""

    def __init__(self) -> None:
        self._loads: dict[Key, _Load] = {}

    def report(self, replica: Key, stats: Mapping[str, Any]) -> None:
        """Take a replica's latest routing stats; the same report again changes nothing."""
        load = self._loads.setdefault(replica, _Load())
        number = stats.get(REPORT_NUMBER, -1)
        if number != load.report_number:
            load.report_number = number
            load.reported = int(stats.get(IN_FLIGHT, 0))
            load.sent_since = 0

    def sent(self, replica: Key) -> None:
        """One more request goes to `replica`."""
        self._loads.setdefault(replica, _Load()).sent_since += 1

    def load(self, replica: Key) -> int:
        """Requests that `replica` is thought to hold."""
        load = self._loads.get(replica)
        return load.reported + load.sent_since if load else 0

    def keep_only(self, replicas: Set[Key]) -> None:
        """Forget replicas that are gone."""
        for gone in self._loads.keys() - replicas:
            del self._loads[gone]
