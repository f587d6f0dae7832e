"""The application without any of its observation, to measure what that costs. For benchmarks/observation_cost.py alone.

No metrics of ours, no statistics of vLLM's, no access log, no per-request acceptance, no traces.
"""

from __future__ import annotations

import logging
from typing import Any

from ray.serve.deployment import Application

import deployments.app
import deployments.server
from deployments.telemetry import Telemetry


class Silence(Telemetry):
    """Publishes nothing."""

    def __init__(self, model_id: str, replica_id: str) -> None:
        pass

    def observe(self, record: Any) -> None:
        pass

    def start(self, stats: Any, *, start_seconds: float) -> None:
        pass


class UnobservedServer(deployments.server.DFlashServer):
    async def __init__(self, llm_config: Any, *, options: Any) -> None:  # type: ignore[misc]
        deployments.server.Telemetry = Silence  # type: ignore[misc]
        await super().__init__(llm_config, options=options)
        logging.getLogger("dflash_serve.access").disabled = True


def build(args: dict[str, Any]) -> Application:
    """As deployments.app.build."""
    kwargs_of = deployments.app.llm_config_kwargs

    def without_statistics(settings: Any) -> dict[str, Any]:
        kwargs = kwargs_of(settings)
        kwargs["log_engine_metrics"] = False
        kwargs["engine_kwargs"]["disable_log_stats"] = True
        kwargs["engine_kwargs"].pop("per_request_spec_decode_metrics", None)
        return kwargs

    deployments.app.llm_config_kwargs = without_statistics
    deployments.server.DFlashServer = UnobservedServer  # type: ignore[misc]
    return deployments.app.build(args)
