"""Which replica a request of Serve's own proxy goes to (`serve run`, `up --plain`).

This router ranks by what replicas report of themselves plus what it sent them since: requests that came by other
proxies count too. HAProxy (`up`, Kubernetes) chooses for itself.
"""

from __future__ import annotations

import itertools
from typing import Any

from ray.serve.config import RequestRouterConfig

from deployments._upstream import (
    FIFOMixin,
    MultiplexMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)
from dflash_serve.routing import LoadBook

STATS_PERIOD_SECONDS = 1.0
STATS_TIMEOUT_SECONDS = 5.0


class LoadAwareRouter(FIFOMixin, MultiplexMixin, RequestRouter):
    """Sends a request to the replica with the fewest requests in flight; ties go round."""

    def initialize_state(self, **kwargs: Any) -> None:
        self._book: LoadBook[ReplicaID] = LoadBook()
        self._turn = itertools.count()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        if not candidate_replicas:
            return []
        turn = next(self._turn)
        rotated = [candidate_replicas[(turn + i) % len(candidate_replicas)] for i in range(len(candidate_replicas))]
        for replica in rotated:
            self._book.report(replica.replica_id, replica.routing_stats)
        ranked = sorted(rotated, key=lambda replica: self._book.load(replica.replica_id))
        self._book.sent(ranked[0].replica_id)
        self._book.keep_only({replica.replica_id for replica in candidate_replicas})
        # one rank: direct streaming takes its first entry, a Serve handle the one with the shortest known queue
        return [ranked]


def request_router_config() -> RequestRouterConfig:
    """Serve's router configuration where HAProxy does not choose."""
    options: dict[str, Any] = {
        "request_router_class": LoadAwareRouter,
        "request_routing_stats_period_s": STATS_PERIOD_SECONDS,
        "request_routing_stats_timeout_s": STATS_TIMEOUT_SECONDS,
    }
    return RequestRouterConfig(**options)
