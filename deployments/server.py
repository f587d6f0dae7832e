"""The replica: Ray Serve LLM's server around one vLLM engine, with our gateway outermost and our metrics beside it."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer

from deployments._upstream import engine_on_own_gpu
from deployments.telemetry import Telemetry
from dflash_serve import demo
from dflash_serve.gateway import Gateway, GatewayConfig, TrafficClasses, load_api_keys
from dflash_serve.routing import IN_FLIGHT, REPORT_NUMBER
from dflash_serve.settings.model import Auth, Limits, Metrics, Settings
from dflash_serve.speculation.acceptance import AcceptanceWindow
from dflash_serve.speculation.report import REPORT_VARIABLE

if TYPE_CHECKING:
    from starlette.types import ASGIApp

logger = logging.getLogger("ray.serve")

ENGINE_CHECK_SECONDS = 0.2
LAST_ANSWERS_SECONDS = 5.0
"""A replica whose engine has died ends then, whoever still waits."""


@dataclass(frozen=True)
class ReplicaOptions:
    """What a replica needs beyond Ray's LLMConfig. Names where keys are, never keys: it is stored in the cluster."""

    auth: Auth
    limits: Limits
    metrics: Metrics

    @classmethod
    def of(cls, settings: Settings) -> ReplicaOptions:
        return cls(settings.auth, settings.limits, settings.metrics)

    def gateway_config(self) -> GatewayConfig:
        """Reads the keys. Raises ValueError when there are none where they should be."""
        return GatewayConfig(
            api_keys=load_api_keys(self.auth.keys_env, Path(self.auth.keys_file) if self.auth.keys_file else None),
            anonymous=self.auth.anonymous,
            max_body_bytes=self.limits.max_body_bytes,
            max_output_tokens=self.limits.max_output_tokens,
            max_n=self.limits.max_n,
            max_concurrent_requests=self.limits.max_concurrent_requests,
            # Serve puts the same id there
            set_request_id_header=False,
            traffic=TrafficClasses(
                tuple(self.metrics.traffic_classes),
                self.metrics.traffic_class_header,
                self.metrics.traffic_class_keys,
            ),
        )


class DFlashServer(LLMServer):
    """One vLLM engine with a DFlash drafter; serves vLLM's own OpenAI app behind our gateway.

    The class is the application's ingress: requests reach `__serve_build_asgi_app__`'s app directly.
    """

    async def __init__(self, llm_config: LLMConfig, *, options: ReplicaOptions) -> None:  # type: ignore[misc]
        # imports vllm, which the machine that builds the application may lack
        from dflash_serve.vllm_ext import parser_parts
        from dflash_serve.vllm_ext.openmp import preload_intel_openmp
        from dflash_serve.vllm_ext.stat_logger import engine_stats

        started = time.monotonic()
        _log_beside_serve()
        if (library := preload_intel_openmp(os.environ)) is not None:
            logger.info("the engine runs with %s", library)
        try:
            parser_parts.install(count_once=not llm_config.engine_kwargs.get("enable_force_include_usage"))
        except (ImportError, AttributeError) as error:
            logger.warning("parsers: vLLM makes each request's from the ground up (%s)", error)
        self._model_id = llm_config.model_id
        self._gateway_config = options.gateway_config()
        self._reports = itertools.count()
        self._gateway: Gateway | None = None
        self._stats = engine_stats()
        self._stats.window = AcceptanceWindow(options.metrics.acceptance_window_seconds)
        # the engine's process inherits it
        self._folder = tempfile.TemporaryDirectory(prefix="dflash-serve-")
        self._stats.draft_length_report = Path(self._folder.name) / "draft_length.json"
        os.environ[REPORT_VARIABLE] = str(self._stats.draft_length_report)
        self._telemetry = Telemetry(self._model_id, serve.get_replica_context().replica_id.unique_id)
        engine = engine_on_own_gpu() if has_one_gpu(llm_config) else None
        await super().__init__(with_local_models(llm_config), engine_cls=engine)
        self._telemetry.start(lambda: self._stats, start_seconds=time.monotonic() - started)
        self._engine_watch = asyncio.create_task(self._end_with_engine())

    @classmethod
    def get_deployment_options(cls, llm_config: LLMConfig) -> dict[str, Any]:  # type: ignore[override]
        """Ray's, and the GPU of a replica that has one is the replica's own, not that of an actor beside it."""
        options: dict[str, Any] = super().get_deployment_options(llm_config)
        if has_one_gpu(llm_config):
            options["ray_actor_options"]["num_gpus"] = 1
        return options

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        app = await super().__serve_build_asgi_app__()
        self._gateway = Gateway(app, self._gateway_config, model_id=self._model_id, observe=self._telemetry.observe)
        return self._gateway

    async def _start_engine(self) -> None:
        """Ray 2.60's also reports usage, statistics on or off, through an actor: 8 s more until the first answer and a
        process that imports vLLM (ray/llm/_internal/serve/observability/usage_telemetry/usage.py)."""
        if self.engine is None:
            raise ValueError("the engine is not set")
        await self.engine.start()

    async def record_routing_stats(self) -> dict[str, Any]:
        """Polled by Serve's controller; what `LoadAwareRouter` ranks replicas by."""
        stats = await super().record_routing_stats()
        return stats | {IN_FLIGHT: self._in_flight, REPORT_NUMBER: next(self._reports)}

    @property
    def _in_flight(self) -> int:
        return self._gateway.in_flight if self._gateway is not None else 0

    async def _end_with_engine(self) -> None:
        """End this replica's process when its engine has died and those who waited for it have their answer.

        It would answer every request with 503 at once, and so draw them all until Serve replaces it: it has the fewest
        in flight. Nobody can connect to a process that is gone; HAProxy takes another replica then. What the replica
        counted since Ray last fetched its metrics (10 s at most) goes with it.
        """
        try:
            while True:
                await self.check_health()
                await asyncio.sleep(ENGINE_CHECK_SECONDS)
        except Exception as error:
            logger.error("the engine has died, and this replica ends: %r", error)
        if self._gateway is not None:
            self._gateway.close()
        for _ in range(round(LAST_ANSWERS_SECONDS / ENGINE_CHECK_SECONDS)):
            # once more after the last answer: it is on its way then
            answering = self._in_flight > 0
            await asyncio.sleep(ENGINE_CHECK_SECONDS)
            if not answering:
                break
        self._folder.cleanup()
        logging.shutdown()
        os._exit(1)


def has_one_gpu(llm_config: LLMConfig) -> bool:
    """Whether each replica has exactly one GPU, by its placement group."""
    bundles = (llm_config.placement_group_config or {}).get("bundles", [])
    return [bundle.get("GPU", 0) for bundle in bundles] == [1]


def with_local_models(llm_config: LLMConfig) -> LLMConfig:
    """The configuration with the bundled pair's names replaced by folders of this node, made when missing.

    Ray caches a parsed engine configuration in the object that the builder made, hence a new object.
    """
    fields = llm_config.model_dump(exclude_unset=True)
    loading = fields["model_loading_config"]
    loading["model_source"] = demo.resolve(loading["model_source"])
    speculative = fields["engine_kwargs"].get("speculative_config")
    if speculative:
        speculative["model"] = demo.resolve(speculative["model"])
    return LLMConfig(**fields)


def _log_beside_serve() -> None:
    """Let our log lines, one a request among them, go where Serve's own go: the replica's file."""
    ours = logging.getLogger("dflash_serve")
    ours.handlers = logging.getLogger("ray.serve").handlers
    ours.setLevel(logging.INFO)
    ours.propagate = False
