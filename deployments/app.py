"""The application builder that serve_config.yaml names."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import ray
from ray import serve
from ray.serve.deployment import Application

from dflash_serve import preflight
from dflash_serve.hardware import NAMED_GPU
from dflash_serve.routing import LOAD_AWARE
from dflash_serve.settings import (
    Cluster,
    Resolved,
    Settings,
    SettingsError,
    check_engine_arguments,
    check_speculation_options,
    llm_config_kwargs,
    resolve,
)

logger = logging.getLogger("ray.serve")

NOT_WITH_THIS_RAY = (
    "does not work with Ray 2.60: its router is not told which replica HAProxy's requests go to, and cannot read those "
    "of Serve's own proxy; leave it out"
)
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def build(args: dict[str, Any]) -> Application:
    """Ray Serve calls this with the application's `args`. Raises SettingsError when they are wrong."""
    from ray.serve.llm import LLMConfig, build_llm_deployment

    from deployments._upstream import HAPROXY, http_host
    from deployments.routing import request_router_config
    from deployments.server import DFlashServer, ReplicaOptions

    resolved = check(args, http_host=http_host(), cluster=cluster_now())
    settings = resolved.settings
    check_names_of_vllm(settings)
    logger.info("profile %s: %s", resolved.profile, resolved.reason)
    found = preflight.run(settings)
    for warning in found.warnings:
        logger.warning("preflight: %s", warning)
    if found.errors:
        raise SettingsError(found.errors)
    llm_config = LLMConfig(**llm_config_kwargs(settings))
    return build_llm_deployment(
        llm_config,
        deployment_cls=serve.ingress()(DFlashServer),
        bind_kwargs={"options": ReplicaOptions.of(settings)},
        # HAProxy chooses itself, by the requests that it has at each replica: asking a router first (Ray's LLMRouter)
        # takes every request longer, and those of a burst one after the other
        override_serve_options={"request_router_config": request_router_config(asked=not HAPROXY)},
    )


def check(args: dict[str, Any], *, http_host: str | None, cluster: Cluster | None = None) -> Resolved:
    """Everything about `args` that can be told before an engine starts. Raises SettingsError.

    Args:
        http_host: The address that Serve's proxies listen on.
        cluster: What the cluster offers; None, before there is one, takes a machine without GPUs.
    """
    resolved = resolve(args, cluster or Cluster(cpus=0, gpus={}))
    if resolved.settings.routing.policy != LOAD_AWARE:
        raise SettingsError([f"routing.policy: {resolved.settings.routing.policy} {NOT_WITH_THIS_RAY}"])
    auth = resolved.settings.auth
    if not auth.has_keys and http_host not in LOOPBACK:
        if auth.anonymous == "loopback":
            raise SettingsError(
                [
                    f"auth: no API keys, and http_options.host is {http_host}; set auth.keys_env or auth.keys_file, "
                    "or http_options.host: 127.0.0.1, or auth.anonymous: anywhere to serve whoever can connect"
                ]
            )
        logger.warning("no API keys: whoever can connect to %s is served (auth.anonymous: anywhere)", http_host)
    return resolved


def check_names_of_vllm(settings: Settings) -> None:
    """Raises SettingsError for engine arguments and speculation options that vLLM does not have. Imports vllm."""
    check_engine_arguments(settings.engine, _engine_argument_names())
    check_speculation_options(settings.speculation.options, _speculation_option_names())


def cluster_now() -> Cluster:
    """CPUs and GPUs of the Ray cluster that this process is connected to, by accelerator type."""
    gpus: dict[str, int] = {}
    for node in ray.nodes():
        resources = node["Resources"]
        if not node["Alive"] or not resources.get("GPU"):
            continue
        kinds = [name.removeprefix(NAMED_GPU) for name in resources if name.startswith(NAMED_GPU)]
        kind = kinds[0] if kinds else ""
        gpus[kind] = gpus.get(kind, 0) + int(resources["GPU"])
    return Cluster(cpus=ray.cluster_resources().get("CPU", 0), gpus=gpus)


def _engine_argument_names() -> set[str]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs

    return {field.name for arguments in (AsyncEngineArgs, FrontendArgs) for field in dataclasses.fields(arguments)}


def _speculation_option_names() -> set[str]:
    from vllm.config import SpeculativeConfig

    return {field.name for field in dataclasses.fields(SpeculativeConfig) if field.init}
