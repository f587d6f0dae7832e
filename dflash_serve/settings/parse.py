"""Reading settings, and saying in one line each what is wrong with them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from dflash_serve import demo
from dflash_serve.settings.model import REMOTE, Settings


class SettingsError(ValueError):
    """One line a problem: `field: what is wrong; how to mend it`."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems

    def __reduce__(self) -> tuple[type[SettingsError], tuple[list[str]]]:
        # Ray carries it from the task that builds the application; exceptions are rebuilt from `args` otherwise
        return (SettingsError, (self.problems,))


KEYS_MEND = "keys do not belong into a configuration; name the variable that holds them in auth.keys_env"

MENDS = {
    "api_key": KEYS_MEND,
    "api_keys": KEYS_MEND,
    "auth.api_key": KEYS_MEND,
    "auth.api_keys": KEYS_MEND,
    "auth.key": KEYS_MEND,
    "auth.keys": KEYS_MEND,
    "num_speculative_tokens": "it is speculation.max_draft_tokens here",
    "speculation.num_speculative_tokens": "it is max_draft_tokens here",
    "speculation.num_draft_tokens": "it is max_draft_tokens here",
    "speculative_config": "use drafter and speculation",
    "engine_kwargs": "it is engine here",
    "model": "it is target here",
    "profile": "a profile cannot stand on another one; copy what you need from it",
}
"""Settings that people try and that live elsewhere."""

_HTTP_MEND = "Ray Serve listens, not vLLM; see http_options in serve_config.yaml"

OWNED_ENGINE_ARGUMENTS = {
    "model": "set target",
    "tokenizer": "the target's is used",
    "served_model_name": "set model_id",
    "revision": "set target_revision",
    "speculative_config": "set drafter and speculation",
    "spec_method": "set drafter and speculation",
    "spec_model": "set drafter",
    "spec_tokens": "set speculation.max_draft_tokens",
    "api_key": "name the variable that holds the keys in auth.keys_env",
    "hf_token": "set HF_TOKEN in the environment of every node; a secret does not belong into a configuration",
    "middleware": "the gateway is the middleware; see limits and auth",
    "tensor_parallel_size": "set hardware.gpus_per_replica",
    "pipeline_parallel_size": "a replica is one node; set hardware.gpus_per_replica",
    "data_parallel_size": "set autoscaling.max_replicas",
    "distributed_executor_backend": "it follows from hardware.gpus_per_replica",
    "disable_log_stats": "the metrics are made of them",
    "otlp_traces_endpoint": "set metrics.otlp_traces_endpoint",
    "override_generation_config.max_new_tokens": "set limits.max_output_tokens",
} | dict.fromkeys(
    ("host", "port", "uds", "root_path", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs"), _HTTP_MEND
)
"""Engine arguments that other settings stand for, and which."""

OWNED_WHEN_ADAPTIVE = (
    "engine.scheduler_cls",
    "engine.worker_cls",
    "speculation.options.num_speculative_tokens_per_batch_size",
)
"""What adaptive speculation sets itself."""

OWNED_SPECULATION_OPTIONS = {
    "method": "it is always dflash",
    "model": "set drafter",
    "revision": "set drafter_revision",
    "num_speculative_tokens": "set speculation.max_draft_tokens",
    "attention_backend": "set speculation.attention_backend",
}
"""Fields of `speculative_config` that other settings stand for, and which."""


def parse(values: Mapping[str, Any]) -> Settings:
    """Validate settings. Raises SettingsError with every problem."""
    problems = _owned(values)
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError([*problems, *(_explain(dict(problem)) for problem in error.errors())]) from None
    if not isinstance(settings.engine.get("override_generation_config", {}), Mapping):
        # limits.max_output_tokens goes into it
        problems.append("engine.override_generation_config: must be a mapping of generation settings; mend it")
    if not isinstance(settings.engine.get("additional_config", {}), Mapping):
        # so do the draft lengths
        problems.append("engine.additional_config: must be a mapping; mend it")
    problems += [
        f"{name}: adaptive speculation sets it; set speculation.mode: fixed, or leave it out"
        for name in OWNED_WHEN_ADAPTIVE
        if settings.adapts and _has(values, name)
    ]
    problems += [*_models(settings), *_hardware(settings)]
    problems += [*_replicas(settings), *_traffic(settings)]
    if problems:
        raise SettingsError(problems)
    return settings


def _owned(values: Mapping[str, Any]) -> list[str]:
    sections = {"engine": OWNED_ENGINE_ARGUMENTS, "speculation.options": OWNED_SPECULATION_OPTIONS}
    return [
        f"{section}.{name}: not here; {mend}"
        for section, owned in sections.items()
        for name, mend in owned.items()
        if _has(values, f"{section}.{name}")
    ]


def _models(settings: Settings) -> list[str]:
    problems = []
    bundled = (("target", settings.target, demo.TARGET), ("drafter", settings.drafter, demo.DRAFTER))
    for name, value, known in bundled:
        if value is not None and value.startswith(demo.PREFIX) and value != known:
            problems.append(f"{name}: no bundled model {value!r}; the bundled one is {known}")
    if not settings.speculates:
        return problems
    if settings.drafter is None:
        problems.append("drafter: missing; name the target's DFlash drafter or set speculation.mode: off")
    elif REMOTE.match(settings.drafter):
        # Ray mirrors the target's bucket alone (VLLMEngineConfig.mirror_config)
        problems.append("drafter: a bucket URL does not work here; use a hub name, or copy it to a folder on each node")
    return problems


def _hardware(settings: Settings) -> list[str]:
    hardware = settings.hardware
    if hardware.is_cpu:
        if hardware.gpus_per_replica != 1:
            return ["hardware.gpus_per_replica: not used with accelerator: cpu; leave it out"]
        return []
    problems = []
    if hardware.kv_cache_gib is not None:
        problems.append("hardware.kv_cache_gib: for accelerator: cpu only; set engine.gpu_memory_utilization instead")
    if hardware.omp_threads is not None:
        problems.append("hardware.omp_threads: for accelerator: cpu only; leave it out")
    return problems


def _replicas(settings: Settings) -> list[str]:
    scaling = settings.autoscaling
    low, high, start = scaling.min_replicas, scaling.max_replicas, scaling.initial_replicas
    if high < low:
        return [f"autoscaling: max_replicas ({high}) is below min_replicas ({low}); raise the one or lower the other"]
    problems = []
    if start is not None and not low <= start <= high:
        problems.append(
            f"autoscaling.initial_replicas: {start} is not between {low} and {high}; change it or leave it out"
        )
    target, most = scaling.target_ongoing_requests, settings.limits.max_concurrent_requests
    if high > max(low, 1) and target >= most:
        problems.append(
            f"autoscaling.target_ongoing_requests: {target:g} is not below limits.max_concurrent_requests ({most}), so "
            "replicas refuse requests and none is added; lower the one or raise the other"
        )
    return problems


def _traffic(settings: Settings) -> list[str]:
    metrics = settings.metrics
    unknown = sorted(set(metrics.traffic_class_keys.values()) - set(metrics.traffic_classes))
    return [f"metrics.traffic_class_keys: no class {name!r}; add it to metrics.traffic_classes" for name in unknown]


def _has(values: Mapping[str, Any], dotted: str) -> bool:
    head, _, rest = dotted.partition(".")
    if head not in values:
        return False
    return not rest or (isinstance(values[head], Mapping) and _has(values[head], rest))


def _explain(problem: dict[str, Any]) -> str:
    """One of pydantic's errors in our words."""
    path = ".".join(str(part) for part in problem["loc"]) or "args"
    if problem["type"] == "extra_forbidden":
        return f"{path}: unknown setting; {MENDS.get(path) or _nearest(problem['loc'])}"
    if problem["type"] == "missing":
        return f"{path}: missing; set it, or name a profile that has it"
    if problem["type"] == "string_pattern_mismatch":
        return f"{path}: must begin with a letter or digit and hold letters, digits and ._/:@+- only; rename it"
    message = problem["msg"].removeprefix("Value error, ")
    # what stands under auth, or in a mapping, may be a secret
    secret = problem["loc"][:1] == ("auth",) or isinstance(problem["input"], (dict, BaseModel))
    given = "" if secret else f"; it is {problem['input']!r}"
    return f"{path}: {message[:1].lower()}{message[1:]}{given}"


def _nearest(location: tuple[str | int, ...]) -> str:
    section: Any = Settings
    for part in location[:-1]:
        section = section.model_fields[str(part)].annotation
    names = list(section.model_fields) + (["profile"] if section is Settings else [])
    close = difflib.get_close_matches(str(location[-1]), names, n=1)
    return f"did you mean {close[0]}?" if close else f"known here: {', '.join(names)}"
