"""Settings -> what `ray.serve.llm.LLMConfig` takes. Pure: the bundled pair's `demo:` names stay names."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from dflash_serve.settings.model import Settings, SettingsError

HEALTH_CHECK_PERIOD_SECONDS = 2
HEALTH_CHECK_TIMEOUT_SECONDS = 20
SERVE_HEADROOM = 64
"""How far Serve's limit of requests a replica lies above ours: its refusal is plain text, ours OpenAI's JSON."""


def llm_config_kwargs(settings: Settings) -> dict[str, Any]:
    """Keyword arguments of LLMConfig (Ray 2.60, ray/llm/_internal/serve/core/configs/llm_config.py)."""
    kwargs: dict[str, Any] = {
        "model_loading_config": {"model_id": settings.served_name, "model_source": settings.target},
        "engine_kwargs": engine_kwargs(settings),
        "deployment_config": deployment_config(settings),
        "runtime_env": {"env_vars": environment(settings)},
        "log_engine_metrics": True,
    }
    hardware = settings.hardware
    if hardware.is_cpu:
        kwargs["accelerator_config"] = {"kind": "cpu"}
        kwargs["placement_group_config"] = {"bundles": [{"CPU": hardware.cpus_per_replica}]}
    else:
        first = {"GPU": 1, "CPU": hardware.cpus_per_replica}
        kwargs["accelerator_type"] = hardware.accelerator
        kwargs["placement_group_config"] = {"bundles": [first] + [{"GPU": 1}] * (hardware.gpus_per_replica - 1)}
    return kwargs


def engine_kwargs(settings: Settings) -> dict[str, Any]:
    """vLLM's engine and front-end arguments."""
    arguments = dict(settings.engine)
    if settings.target_revision:
        arguments["revision"] = settings.target_revision
    if settings.hardware.gpus_per_replica > 1:
        arguments["tensor_parallel_size"] = settings.hardware.gpus_per_replica
    if settings.limits.max_output_tokens is not None:
        # vLLM bounds requests that name no limit by this; the gateway refuses those that name a higher one
        generation = arguments.get("override_generation_config", {})
        arguments["override_generation_config"] = generation | {"max_new_tokens": settings.limits.max_output_tokens}
    if settings.speculates:
        arguments["speculative_config"] = speculative_config(settings)
    else:
        arguments.pop("per_request_spec_decode_metrics", None)
    return arguments


def speculative_config(settings: Settings) -> dict[str, Any]:
    """vLLM's `speculative_config` (vllm/config/speculative.py)."""
    speculation = settings.speculation
    config = {
        "method": "dflash",
        "model": settings.drafter,
        "num_speculative_tokens": speculation.num_draft_tokens,
        "attention_backend": speculation.attention_backend,
        "revision": settings.drafter_revision,
    }
    return {name: value for name, value in config.items() if value is not None} | speculation.options


def deployment_config(settings: Settings) -> dict[str, Any]:
    """Ray Serve's deployment options, the request router apart."""
    autoscaling = settings.autoscaling
    return {
        "autoscaling_config": {
            "min_replicas": autoscaling.min_replicas,
            "max_replicas": autoscaling.max_replicas,
            "initial_replicas": autoscaling.initial_replicas
            if autoscaling.initial_replicas is not None
            else max(autoscaling.min_replicas, 1),
            "target_ongoing_requests": autoscaling.target_ongoing_requests,
            "upscale_delay_s": autoscaling.upscale_delay_s,
            "downscale_delay_s": autoscaling.downscale_delay_s,
        },
        "max_ongoing_requests": settings.limits.max_concurrent_requests + SERVE_HEADROOM,
        # the placement group's first bundle carries the CPUs
        "ray_actor_options": {"num_cpus": 0},
        "health_check_period_s": HEALTH_CHECK_PERIOD_SECONDS,
        "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_SECONDS,
        "graceful_shutdown_timeout_s": settings.limits.max_stream_seconds,
    }


def environment(settings: Settings) -> dict[str, str]:
    """Environment variables of the replica's processes."""
    variables = {
        # bounds what the gateway does not parse
        "VLLM_MAX_N_SEQUENCES": str(settings.limits.max_n),
        "VLLM_NO_USAGE_STATS": "1",
    }
    hardware = settings.hardware
    if hardware.is_cpu:
        # vLLM would bind each replica to the same cores
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        if hardware.kv_cache_gib is not None:
            variables["VLLM_CPU_KVCACHE_SPACE"] = f"{hardware.kv_cache_gib:g}"
        if hardware.omp_threads is not None:
            variables["OMP_NUM_THREADS"] = str(hardware.omp_threads)
    return variables


def check_engine_arguments(engine: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises SettingsError for names that vLLM does not have, with the nearest that it has."""
    problems = []
    for name in engine.keys() - set(known):
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else "see vLLM's engine arguments, with underscores"
        problems.append(f"engine.{name}: vLLM has no such argument; {hint}")
    if problems:
        raise SettingsError(sorted(problems))
