"""What keeps a stopping worker waiting."""

from __future__ import annotations

import pytest

from deployments.drain import is_serving


@pytest.mark.parametrize(
    ("titles", "serving"),
    [
        (["/usr/bin/python ray start", "ray::ServeReplica:dflash:DFlashServer:smollm2"], True),
        (["ray::HAProxyManager"], True),
        (["ray::ProxyActor"], True),
        (["ray::IDLE", "raylet", "ray::DashboardAgent", ""], False),
    ],
)
def test_replicas_and_proxies_are_waited_for(titles: list[str], serving: bool) -> None:
    assert is_serving(titles) is serving
