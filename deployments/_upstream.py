"""Every private name of Ray that we lean on, but for the one hook that server.py overrides.
tests/unit/deployments/test_upstream.py fails when one moves, or when another is used elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray.llm._internal.serve.constants import RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING
from ray.serve._private.api import serve_start as _serve_start
from ray.serve._private.common import ReplicaID
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve._private.request_router.request_router import FIFOMixin, MultiplexMixin, RequestRouter
from ray.serve.context import _get_global_client

if TYPE_CHECKING:
    from ray.serve._private.client import ServeControllerClient
    from ray.serve.deployment import Application
    from ray.serve.llm import LLMConfig
    from ray.serve.schema import ServeDeploySchema

DIRECT_STREAMING: bool = RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING

__all__ = [
    "DIRECT_STREAMING",
    "FIFOMixin",
    "MultiplexMixin",
    "PendingRequest",
    "ReplicaID",
    "RequestRouter",
    "RunningReplica",
    "attach_direct_streaming",
    "http_host",
    "serve_start",
]


def attach_direct_streaming(server: Application, llm_config: LLMConfig) -> Application:
    """Put Ray's `LLMRouter` in front: HAProxy asks it for a replica and then talks to that replica itself."""
    from ray.llm._internal.serve.core.ingress.builder import _build_openai_ingress_request_router

    router = _build_openai_ingress_request_router(server=server, llm_config=llm_config)
    return server._with_ingress_request_router(router)


def http_host() -> str | None:
    """The address that Serve's HTTP proxies listen on; None when Serve has not started."""
    client = _get_global_client(raise_if_no_controller_running=False)
    return client.http_config.host if client is not None else None


def serve_start(config: ServeDeploySchema) -> ServeControllerClient:
    """Start Serve as `serve run CONFIG` does, with the configuration's proxy and HTTP options."""
    return _serve_start(
        http_options=config.http_options.model_dump(),
        proxy_location=config.proxy_location,
        controller_options=config.controller_options,
    )
