"""Which replica a request of Serve's own proxy goes to (`serve run`, `up --plain`).

This router ranks by what replicas report of themselves plus what it sent them since: requests that came by other
proxies count too. HAProxy (`up`, Kubernetes) chooses for itself.
"""

from __future__ import annotations

import itertools
from typing import Any

from ray import cloudpickle
from ray.serve.config import RequestRouterConfig

from deployments._upstream import (
    FIFOMixin,
    MultiplexMixin,
    PendingRequest,
    PowerOfTwoChoicesRequestRouter,
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


def request_router_config(*, asked: bool) -> RequestRouterConfig:
    """Serve's router configuration.

    Args:
        asked: Whether Serve's router chooses. Where HAProxy does, Ray refuses any router but its own, which only the
            head's proxy asks while no replica is there: then only how that one is stored is ours. Ray 2.60 stores its
            code, 109 kB, and each replica repeats its configuration to a controller that comes back. An answer above
            100 kB waits in the object store until the replica's node knows the new head's, which can take longer than
            the 30 s after which the controller gives a replica up: all were replaced when a head came back. By name it
            is 100 bytes. (Ray compares routers without this: an application that runs takes it with its next change.)
    """
    if not asked:
        config = RequestRouterConfig()
        config.set_serialized_request_router_cls(cloudpickle.dumps(PowerOfTwoChoicesRequestRouter))
        return config
    options: dict[str, Any] = {
        "request_router_class": LoadAwareRouter,
        "request_routing_stats_period_s": STATS_PERIOD_SECONDS,
        "request_routing_stats_timeout_s": STATS_TIMEOUT_SECONDS,
    }
    return RequestRouterConfig(**options)
