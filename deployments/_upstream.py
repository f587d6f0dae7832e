"""Every private name of Ray that we lean on, but for the one hook that server.py overrides.
tests/unit/deployments/test_upstream.py fails when one moves, or when another is used elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray.serve._private.api import serve_start as _serve_start
from ray.serve._private.common import ReplicaID
from ray.serve._private.constants import RAY_SERVE_ENABLE_HA_PROXY
from ray.serve._private.request_router import PowerOfTwoChoicesRequestRouter
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve._private.request_router.request_router import FIFOMixin, MultiplexMixin, RequestRouter
from ray.serve.context import _get_global_client

if TYPE_CHECKING:
    from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
    from ray.serve._private.client import ServeControllerClient
    from ray.serve.schema import ServeDeploySchema

HAPROXY: bool = RAY_SERVE_ENABLE_HA_PROXY
"""Whether HAProxy, not Serve's own proxy, takes requests to replicas."""

__all__ = [
    "HAPROXY",
    "FIFOMixin",
    "MultiplexMixin",
    "PendingRequest",
    "PowerOfTwoChoicesRequestRouter",
    "ReplicaID",
    "RequestRouter",
    "RunningReplica",
    "engine_on_own_gpu",
    "http_host",
    "serve_start",
]


def engine_on_own_gpu() -> type[VLLMEngine]:
    """Ray's engine for a replica that holds its GPU itself: the model runs in the engine's process, as in `vllm serve`.

    Ray 2.60 gives every GPU engine vLLM's Ray executor, also where there is one GPU: each step then goes to an actor of
    its own and back, through shared memory that both poll. (Ray Data's engines have had vLLM's own choice since
    ray-project/ray#60934.) Can go when `distributed_executor_backend` may be `uni` in an LLMConfig.

    When the replica is killed, Ray ends its engine and so frees the GPU: `RAY_process_group_cleanup_enabled`, on by
    default, must be left so. Imports vLLM.
    """
    from ray.llm._internal.serve.engines.vllm import vllm_engine

    class EngineOnOwnGPU(vllm_engine.VLLMEngine):
        def _prepare_engine_config(self, callback_ctx: Any) -> Any:
            """Ray builds the configuration in a task that needs the placement group's GPU, which the replica now holds.
            So it is built here, with vLLM's executor of one process."""
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.usage.usage_lib import UsageContext

            config: Any = self.llm_config.get_engine_config()
            vllm_engine._resolve_hf_model_id_from_mirror(config)
            kwargs = config.get_initialization_kwargs() | {"distributed_executor_backend": "uni"}
            arguments = AsyncEngineArgs(**vllm_engine._normalize_vllm_engine_kwargs(kwargs))
            front_end = vllm_engine.FrontendArgs(**config.frontend_kwargs)
            return arguments, front_end, arguments.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)

    return EngineOnOwnGPU


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
