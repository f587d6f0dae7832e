"""Tells when a private name of Ray or vLLM that we lean on has moved or changed its shape."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]


def test_names_of_ray() -> None:
    from deployments import _upstream

    assert isinstance(_upstream.HAPROXY, bool)
    assert {"http_options", "proxy_location"} <= inspect.signature(_upstream._serve_start).parameters.keys()


def test_router_hooks_of_ray() -> None:
    from ray.serve._private.router import AsyncioRouter

    from deployments._upstream import RequestRouter, RunningReplica

    assert list(inspect.signature(RequestRouter.choose_replicas).parameters) == [
        "self",
        "candidate_replicas",
        "pending_request",
    ]
    assert isinstance(RunningReplica.routing_stats, property)
    source = inspect.getsource(AsyncioRouter.choose_replica)
    assert "_choose_replicas_with_backoff" in source, "direct streaming took another way to a replica"


def test_a_router_that_haproxy_does_not_ask_is_stored_by_name() -> None:
    from ray import cloudpickle
    from ray.serve.config import RequestRouterConfig

    from deployments.routing import request_router_config

    inlined = 100 * 1024  # max_direct_call_object_size in Ray's src/ray/common/ray_config_def.h
    for asked in (False, True):
        assert len(cloudpickle.dumps(request_router_config(asked=asked))) < inlined / 10
    ours, rays = request_router_config(asked=False), RequestRouterConfig()
    assert ours.is_default_request_router(), "behind HAProxy Ray refuses any other"
    assert ours.get_request_router_class().__name__ == rays.get_request_router_class().__name__
    assert len(cloudpickle.dumps(rays)) > inlined, "Ray's own would do"


def test_haproxy_sends_a_request_to_the_replica_that_has_least_and_to_another_where_it_cannot_connect() -> None:
    from ray.serve._private import constants
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

    from dflash_serve import haproxy

    ours = haproxy.variables()
    assert ours["RAY_SERVE_HAPROXY_BALANCE_ALGORITHM"].startswith("leastconn\n")
    for name in ours:
        assert f'"{name}"' in inspect.getsource(constants)
    assert constants.RAY_SERVE_HAPROXY_OBSERVE_MARK_DOWN_ENABLED
    for line in ("balance {{ config.balance_algorithm }}", "option redispatch 1", "retry-on {{ config.retry_on }}"):
        assert line in HAPROXY_CONFIG_TEMPLATE
    # what we add to the algorithm's line comes after Ray's error page, and so counts
    defaults = HAPROXY_CONFIG_TEMPLATE[: HAPROXY_CONFIG_TEMPLATE.index("frontend ")]
    assert defaults.index("errorfile 504") < defaults.index("balance {{")


def test_server_hooks_of_ray() -> None:
    from ray.serve.llm.deployment import LLMServer

    assert inspect.iscoroutinefunction(LLMServer.__serve_build_asgi_app__)
    assert inspect.iscoroutinefunction(LLMServer.record_routing_stats)
    assert inspect.iscoroutinefunction(LLMServer.check_health)
    lines = [line.strip() for line in inspect.getsource(LLMServer._start_engine).splitlines()]
    assert lines[4:6] == ["await self.engine.start()", ""], "our override leaves out more than reports"
    assert lines[7].startswith("push_telemetry_report_for_all_models")


def test_engine_hooks_of_ray() -> None:
    from ray.llm._internal.serve.engines.vllm import vllm_engine, vllm_models

    hook = vllm_engine.VLLMEngine._prepare_engine_config
    assert list(inspect.signature(hook).parameters) == ["self", "callback_ctx"]
    ours = {"get_engine_config", "_resolve_hf_model_id_from_mirror", "_normalize_vllm_engine_kwargs"}
    ours |= {"get_initialization_kwargs", "AsyncEngineArgs", "create_engine_config", "FrontendArgs"}
    # what our override leaves out: the task with a GPU, and an error's wrapping
    left_out = {"remote", "options", "get", "PlacementGroupSchedulingStrategy", "get_remote_options", "RuntimeError"}
    found = called(hook) | called(vllm_engine._get_vllm_engine_config)
    assert found - {"_get_vllm_engine_config"} == ours | left_out
    source = inspect.getsource(vllm_models.VLLMEngineConfig.get_initialization_kwargs)
    assert "executor_backend = EXECUTOR_BACKEND_RAY" in source, "Ray has come to know GPU engines of one process"


def called(function: Any) -> set[str]:
    """Names of what it calls, without what they belong to."""
    calls = [n for n in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))) if isinstance(n, ast.Call)]
    return {n.func.attr if isinstance(n.func, ast.Attribute) else ast.unparse(n.func) for n in calls}


def test_no_other_file_leans_on_a_private_name_of_ray() -> None:
    for path in sorted((ROOT / "deployments").glob("*.py")):
        if path.name != "_upstream.py":
            assert not [name for name in imported_from_ray(path) if "._" in name], path.name


def test_the_replica_shares_one_private_name_with_its_base() -> None:
    """Another one shared would be leant on, or overwritten by chance."""
    from deployments.server import DFlashServer

    ours = private_names(DFlashServer)
    rays = {name for base in DFlashServer.__mro__[1:-1] for name in private_names(base)}
    assert {"_engine_cls", "_llm_config"} <= rays, "Ray's private names are found"
    assert ours & rays == {"_start_engine"}


def test_the_router_shares_no_private_name_with_its_base() -> None:
    from deployments.routing import LoadAwareRouter

    rays = {name for base in LoadAwareRouter.__mro__[1:-1] for name in private_names(base)}
    assert "_replicas" in rays, "Ray's private names are found"
    assert private_names(LoadAwareRouter) & rays == set()


def private_names(cls: type) -> set[str]:
    """Names with one underscore that the class defines, or uses of itself; Python's own left out."""
    used = set(re.findall(r"\bself\.(_[a-z]\w*)", inspect.getsource(cls)))
    return used | {name for name in vars(cls) if re.match(r"_[a-z]", name)} - {"_abc_impl", "_is_protocol"}


def imported_from_ray(path: Path) -> list[str]:
    """Full names of what the file imports from Ray."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "ray":
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names if alias.name.partition(".")[0] == "ray"]
    return names


def test_names_of_vllm() -> None:
    from vllm.model_executor.models import qwen3_dflash
    from vllm.v1.metrics.loggers import STAT_LOGGER_PLUGINS_GROUP, StatLoggerBase
    from vllm.v1.spec_decode.metrics import SpecDecodingStats

    assert STAT_LOGGER_PLUGINS_GROUP == "vllm.stat_logger_plugins"
    assert "scheduler_stats" in inspect.signature(StatLoggerBase.record).parameters
    stats = SpecDecodingStats.new(num_spec_tokens=3)
    stats.observe_draft(num_draft_tokens=3, num_accepted_tokens=2)
    assert (stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens) == (1, 3, 2)
    assert stats.num_accepted_tokens_per_pos == [1, 1, 0]
    assert qwen3_dflash.DFlashQwen3ForCausalLM.model_cls is qwen3_dflash.DFlashQwen3Model
    assert "_k_norm_weights" in inspect.getsource(qwen3_dflash.DFlashQwen3Model._normalize_context_k)
