"""Settings -> what `ray.serve.llm.LLMConfig` takes. Pure: the bundled pair's `demo:` names stay names."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from typing import Any

from dflash_serve.hardware import ANY_GPU
from dflash_serve.settings.model import Settings
from dflash_serve.settings.parse import SettingsError
from dflash_serve.speculation import step_cost
from dflash_serve.speculation.config import AdaptiveConfig, batch_size_schedule
from dflash_serve.speculation.controller import default_choices

ADAPTIVE_SCHEDULER = "dflash_serve.vllm_ext.scheduler.AdaptiveScheduler"
ADAPTIVE_CPU_WORKER = "dflash_serve.vllm_ext.cpu_worker.AdaptiveCPUWorker"
ADAPTIVE_GPU_WORKER = "dflash_serve.vllm_ext.gpu_worker.AdaptiveWorker"
DEFAULT_MAX_NUM_SEQS = 256
"""Where `engine.max_num_seqs` is left to vLLM; its own depends on the hardware, and its last K stands beyond."""
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
        return kwargs
    if hardware.accelerator != ANY_GPU:
        kwargs["accelerator_type"] = hardware.accelerator
    first = {"GPU": 1, "CPU": hardware.cpus_per_replica}
    others = [{"GPU": 1} for _ in range(hardware.gpus_per_replica - 1)]
    # tensor parallelism across nodes would be slower than one GPU
    kwargs["placement_group_config"] = {"bundles": [first, *others], "strategy": "STRICT_PACK"}
    return kwargs


def engine_kwargs(settings: Settings) -> dict[str, Any]:
    """vLLM's engine and front-end arguments."""
    arguments = dict(settings.engine)
    if settings.target_revision is not None:
        arguments["revision"] = settings.target_revision
    if settings.hardware.gpus_per_replica > 1:
        arguments["tensor_parallel_size"] = settings.hardware.gpus_per_replica
    if settings.limits.max_output_tokens is not None:
        # vLLM bounds requests that name no limit by this; the gateway refuses those that name a higher one
        generation = arguments.get("override_generation_config", {})
        arguments["override_generation_config"] = generation | {"max_new_tokens": settings.limits.max_output_tokens}
    if settings.metrics.otlp_traces_endpoint is not None:
        arguments["otlp_traces_endpoint"] = settings.metrics.otlp_traces_endpoint
    if settings.speculates:
        arguments["speculative_config"] = speculative_config(settings)
        if settings.adapts:
            arguments |= adaptive_arguments(settings)
    else:
        arguments.pop("per_request_spec_decode_metrics", None)
    return arguments


def engine_args(settings: Settings) -> dict[str, Any]:
    """Of `engine_kwargs`, the engine's own: what `vllm.LLM` takes. Imports vLLM."""
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    return {name: value for name, value in engine_kwargs(settings).items() if name in known}


def adaptive_arguments(settings: Settings) -> dict[str, Any]:
    """vLLM's arguments that put our choice of the draft length into the engine."""
    return {
        "scheduler_cls": ADAPTIVE_SCHEDULER,
        "worker_cls": ADAPTIVE_CPU_WORKER if settings.hardware.is_cpu else ADAPTIVE_GPU_WORKER,
        "additional_config": settings.engine.get("additional_config", {}) | adaptive_config(settings).to_additional(),
    }


def adaptive_config(settings: Settings) -> AdaptiveConfig:
    """Reads the surface of step costs; the settings have checked that it can be read."""
    speculation = settings.speculation
    most = speculation.max_draft_tokens
    stated = speculation.draft_token_choices or default_choices(most)
    choices = sorted({*(count for count in stated if count < most), most})
    return AdaptiveConfig(
        tuple(choices),
        step_cost.load(speculation.step_costs or step_cost.GENERIC),
        speculation.exploration,
    )


def speculative_config(settings: Settings) -> dict[str, Any]:
    """vLLM's `speculative_config` (vllm/config/speculative.py)."""
    speculation = settings.speculation
    config: dict[str, Any] = {
        "method": "dflash",
        "model": settings.drafter,
        "revision": settings.drafter_revision,
        "num_speculative_tokens": speculation.max_draft_tokens,
        "attention_backend": speculation.attention_backend,
    }
    if settings.adapts:
        choices = adaptive_config(settings).choices
        most = settings.engine.get("max_num_seqs", DEFAULT_MAX_NUM_SEQS)
        config |= {
            "num_speculative_tokens": choices[-1],
            "num_speculative_tokens_per_batch_size": batch_size_schedule(choices, max(most, 1)),
        }
    return {name: value for name, value in config.items() if value is not None} | speculation.options


def deployment_config(settings: Settings) -> dict[str, Any]:
    """Ray Serve's deployment options, the request router apart."""
    autoscaling = settings.autoscaling
    return {
        "autoscaling_config": {
            "min_replicas": autoscaling.min_replicas,
            "max_replicas": autoscaling.max_replicas,
            "initial_replicas": autoscaling.replicas_at_start,
            "target_ongoing_requests": autoscaling.target_ongoing_requests,
            "upscale_delay_s": autoscaling.upscale_delay_s,
            "downscale_delay_s": autoscaling.downscale_delay_s,
        },
        "max_surge_percent": autoscaling.max_surge_percent,
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
        # whatever a node's own environment says: no development endpoints, no adapters loaded by clients, and no
        # redirect from an allowed media domain to another place
        "VLLM_SERVER_DEV_MODE": "0",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0",
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
    }
    if settings.metrics.otlp_traces_endpoint is not None:
        # vLLM's exporter reads it (vllm/tracing/otel.py)
        variables["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] = settings.metrics.otlp_traces_protocol
    hardware = settings.hardware
    if hardware.is_cpu:
        # vLLM would bind each replica to the same cores
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        if hardware.kv_cache_gib is not None:
            variables["VLLM_CPU_KVCACHE_SPACE"] = str(hardware.kv_cache_gib)
        if hardware.omp_threads is not None:
            variables["OMP_NUM_THREADS"] = str(hardware.omp_threads)
    return variables


def check_engine_arguments(engine: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises SettingsError for names that vLLM does not have, with the nearest that it has.

    Args:
        engine: `Settings.engine`.
        known: Fields of vLLM's AsyncEngineArgs and FrontendArgs.
    """
    _check_names("engine", engine, known, "see vLLM's engine arguments, with underscores")


def check_speculation_options(options: Mapping[str, Any], known: Collection[str]) -> None:
    """The same for `Settings.speculation.options`; `known`: fields of vLLM's SpeculativeConfig."""
    _check_names("speculation.options", options, known, "see SpeculativeConfig of vLLM")


def _check_names(section: str, values: Mapping[str, Any], known: Collection[str], otherwise: str) -> None:
    problems = []
    for name in sorted(values.keys() - set(known)):
        close = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
        hint = f"did you mean {close[0]}?" if close else otherwise
        problems.append(f"{section}.{name}: vLLM has no such argument; {hint}")
    if problems:
        raise SettingsError(problems)
