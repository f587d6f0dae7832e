"""Tells when a private name of Ray or vLLM that we lean on has moved or changed its shape."""

from __future__ import annotations

import inspect


def test_names_of_ray() -> None:
    from ray.llm._internal.serve.core.ingress import builder
    from ray.serve.deployment import Application

    from deployments import _upstream

    assert isinstance(_upstream.DIRECT_STREAMING, bool)
    assert list(inspect.signature(builder._build_openai_ingress_request_router).parameters) == ["server", "llm_config"]
    assert callable(Application._with_ingress_request_router)
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


def test_server_hooks_of_ray() -> None:
    from ray.serve.llm.deployment import LLMServer

    assert inspect.iscoroutinefunction(LLMServer.__serve_build_asgi_app__)
    assert inspect.iscoroutinefunction(LLMServer.record_routing_stats)
    assert inspect.iscoroutinefunction(LLMServer.check_health)
    lines = [line.strip() for line in inspect.getsource(LLMServer._start_engine).splitlines()]
    assert lines[4:6] == ["await self.engine.start()", ""], "our override leaves out more than reports"
    assert lines[7].startswith("push_telemetry_report_for_all_models")


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
