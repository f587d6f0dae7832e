"""Judges a configuration against both models' config.json and what is installed. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dflash_serve import demo
from dflash_serve.gemma import is_gemma
from dflash_serve.preflight.memory import Estimate, text_only
from dflash_serve.preflight.shapes import SLIDING, text_config
from dflash_serve.settings.model import REMOTE, Settings

NON_CAUSAL_BACKENDS = (
    "CPU_ATTN",
    "FLASHINFER",
    "FLASH_ATTN",
    "FLEX_ATTENTION",
    "ROCM_AITER_FA",
    "ROCM_ATTN",
    "TRITON_ATTN",
)
"""vLLM 0.29's attention backends, MLA's aside, whose `supports_non_causal` is true."""
PINNED = re.compile(r"[0-9a-f]{40}")
SMALLEST_RETENTION = 64
SLACK = 0.1
"""Share of a GPU by which the estimate may be wrong: what is short of less than that is no error."""
GIB = 1024**3


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, as `field: what is wrong; how to mend it`."""

    severity: Literal["error", "warning"]
    field: str
    problem: str
    mend: str

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}; {self.mend}"


@dataclass(frozen=True)
class Surroundings:
    """What the configuration meets where it runs."""

    has_vllm: bool
    plugin_installed: bool
    plugins_allowed: str | None
    """VLLM_PLUGINS; None loads every plugin."""
    has_logits_processors: bool
    """Whether an installed package registers logits processors with vLLM."""
    runner: str | None
    """VLLM_USE_V2_MODEL_RUNNER."""
    gpu_bytes: int | None
    """Memory of one GPU here; None without one."""

    @property
    def plugin_active(self) -> bool:
        allowed = self.plugins_allowed
        return self.plugin_installed and (allowed is None or "dflash_serve" in allowed.split(","))


def check(
    settings: Settings,
    target: Mapping[str, Any] | None,
    drafter: Mapping[str, Any] | None,
    here: Surroundings,
    memory: Estimate | None = None,
) -> list[Finding]:
    """Everything that is found, errors first.

    Args:
        target, drafter: Each one's config.json; None where it is not to be had, and checks that need it are left out.
        memory: From `memory.estimate`; None on CPU or where it cannot be told.
    """
    findings = [*_pinned(settings)]
    if settings.speculates:
        findings += [*_speculation(settings, here)]
        if target is not None:
            findings += [*_target(settings, text_config(target), here)]
        if drafter is not None:
            findings += [*_drafter(settings, drafter, here)]
        if target is not None and drafter is not None:
            findings += [*_pair(text_config(target), drafter)]
    if target is not None:
        findings += [*_media(settings, target)]
    if memory is not None:
        findings += [*_memory(settings, memory)]
    return sorted(findings, key=lambda finding: finding.severity)


def v1_reasons(settings: Settings, here: Surroundings) -> list[str]:
    """Why vLLM would run its V1 model runner; it falls back to it with no more than a log line.

    Source: VllmConfig._get_v2_model_runner_unsupported_features, vllm/config/vllm.py.
    """
    engine = settings.engine
    if settings.hardware.is_cpu:
        return ["accelerator: cpu"]
    if here.runner is not None:
        return [] if here.runner.lower() in ("1", "true") else [f"VLLM_USE_V2_MODEL_RUNNER={here.runner}"]
    set_here = [f"engine.{name}" for name in _V1_ENGINE_ARGUMENTS if engine.get(name)]
    compilation = engine.get("compilation_config")
    if isinstance(compilation, Mapping):
        if compilation.get("mode") in (1, "STOCK_TORCH_COMPILE"):
            set_here.append("engine.compilation_config.mode")
        passes = compilation.get("pass_config")
        if isinstance(passes, Mapping) and settings.hardware.gpus_per_replica > 1:
            # sequence parallelism, and what switches it on
            names = [name for name in ("enable_sp", "fuse_gemm_comms") if passes.get(name)]
            set_here += [f"engine.compilation_config.pass_config.{name}" for name in names]
    if here.has_logits_processors:
        set_here.append("an installed logits processor (entry point vllm.logits_processors)")
    return set_here


_V1_ENGINE_ARGUMENTS = ("logits_processors", "enable_dbo", "enable_elastic_ep", "kv_sharing_fast_prefill")


def is_pinned(revision: str | None) -> bool:
    """Whether it names one commit for good."""
    return PINNED.fullmatch(revision or "") is not None


def _pinned(settings: Settings) -> Iterator[Finding]:
    models = [("target", settings.target, settings.target_revision)]
    if settings.speculates and settings.drafter is not None:
        models.append(("drafter", settings.drafter, settings.drafter_revision))
    for name, model, revision in models:
        elsewhere = model.startswith(("/", ".", "~", demo.PREFIX)) or REMOTE.match(model)
        if not elsewhere and not is_pinned(revision):
            yield Finding(
                "warning",
                f"{name}_revision",
                f"{revision or 'not set'}, so a replica that starts later may get another {name}",
                "pin the commit (40 hex digits, on the model's page under Files, History)",
            )


def _speculation(settings: Settings, here: Surroundings) -> Iterator[Finding]:
    if settings.hardware.is_cpu and settings.speculation.options.get("rejection_sample_method") == "synthetic":
        yield Finding(
            "error",
            "speculation.options.rejection_sample_method",
            "vLLM's CPU sampler has no synthetic acceptance: the engine would stop at the first request",
            "take it out",
        )
    backend = settings.speculation.attention_backend
    if backend is not None and backend.upper() not in NON_CAUSAL_BACKENDS:
        yield Finding(
            "error",
            "speculation.attention_backend",
            f"{backend} has no non-causal attention, which DFlash drafts with",
            f"set FLASH_ATTN, or one of {', '.join(NON_CAUSAL_BACKENDS)}",
        )
    if not settings.hardware.is_cpu and (reasons := v1_reasons(settings, here)):
        yield Finding(
            "warning",
            reasons[0].partition(" ")[0].partition("=")[0],
            f"vLLM falls back to its V1 model runner because of {' and '.join(reasons)}",
            "take that out; DFlash is measured on V2, and drafters that mix sliding and full layers need it",
        )
    tokens, requests = settings.engine.get("max_num_batched_tokens"), settings.engine.get("max_num_seqs")
    if tokens is not None and requests is not None:
        # each request verifies 1 + K tokens, and the drafter's block takes K slots more (vLLM's scheduler)
        a_request = 2 * settings.speculation.max_draft_tokens + 1
        if tokens // a_request < requests:
            yield Finding(
                "warning",
                "engine.max_num_batched_tokens",
                f"{tokens} lets {tokens // a_request} requests run at once, not max_num_seqs ({requests}): each takes "
                f"{a_request} tokens of a step",
                f"raise it to {a_request * requests} or lower max_num_seqs",
            )


def _target(settings: Settings, target: Mapping[str, Any], here: Surroundings) -> Iterator[Finding]:
    if is_gemma(target.get("model_type")) and here.has_vllm and not here.plugin_active:
        why = (
            f"VLLM_PLUGINS={here.plugins_allowed} leaves it out"
            if here.plugin_installed
            else "dflash-serve is not installed as a package, so vLLM does not find it"
        )
        yield Finding(
            "error",
            "VLLM_PLUGINS" if here.plugin_installed else "drafter",
            f"the plugin that gives the drafter Gemma's embedding normaliser is not active: {why}",
            "add dflash_serve to VLLM_PLUGINS or unset it" if here.plugin_installed else "pip install dflash-serve",
        )
    engine = settings.engine
    caches = engine.get("enable_prefix_caching") is not False
    windows = SLIDING in (target.get("layer_types") or ()) and target.get("sliding_window")
    if caches and windows and not engine.get("prefix_cache_retention_interval"):
        yield Finding(
            "warning",
            "engine.prefix_cache_retention_interval",
            f"by vLLM's default a repeated prompt longer than the window ({windows}) is never found in the prefix "
            "cache beside a drafter",
            f"set it to {windows} (it must be a multiple of {SMALLEST_RETENTION})",
        )


def _drafter(settings: Settings, drafter: Mapping[str, Any], here: Surroundings) -> Iterator[Finding]:
    if "speculators_model_type" in drafter or "speculators_config" in drafter:
        causal = drafter.get("sliding_window_non_causal") is False
        yield Finding(
            "error" if causal else "warning",
            "drafter",
            "its config.json is in speculators format, "
            + ("which vLLM reads as causal in every layer" if causal else "which is not tested here"),
            "take the drafter in z-lab's format (architectures: [DFlashDraftModel])",
        )
        return
    own = drafter.get("dflash_config") or {}
    if drafter.get("is_causal") or own.get("causal"):
        yield Finding(
            "error",
            "drafter",
            "its config.json makes every layer causal, and a DFlash block is drafted in both directions",
            "take out is_causal and dflash_config.causal, or take a DFlash drafter",
        )
    sliding = sum(kind == SLIDING for kind in drafter.get("layer_types") or ())
    if 0 < sliding < len(drafter.get("layer_types") or ()) and (reasons := v1_reasons(settings, here)):
        yield Finding(
            "error",
            "drafter",
            f"it mixes sliding and full layers, which vLLM's V1 model runner cannot run, and that one runs because "
            f"of {' and '.join(reasons)}",
            "serve it on a GPU" if settings.hardware.is_cpu else "take that out",
        )


def _pair(target: Mapping[str, Any], drafter: Mapping[str, Any]) -> Iterator[Finding]:
    """Only what both sides state."""
    own = drafter.get("dflash_config") or {}
    mend = "name the drafter that was trained for this target"
    for name, theirs in (("hidden_size", drafter.get("target_hidden_size") or drafter.get("hidden_size")),):
        if name in target and theirs is not None and theirs != target[name]:
            yield Finding("error", "drafter", f"its {name} is {theirs}, the target's {target[name]}", mend)
    vocabulary = drafter.get("vocab_size")
    if "vocab_size" in target and vocabulary is not None and vocabulary != target["vocab_size"]:
        yield Finding("error", "drafter", f"its vocab_size is {vocabulary}, the target's {target['vocab_size']}", mend)
    count = target.get("num_hidden_layers")
    ids = own.get("target_layer_ids")
    if not ids:
        yield Finding("error", "drafter", "its config.json has no dflash_config.target_layer_ids", mend)
    elif count is not None and not all(0 <= index < count for index in ids):
        problem = f"its target_layer_ids {list(ids)} are not all among the target's {count} layers"
        yield Finding("error", "drafter", problem, mend)
    trained_for = drafter.get("num_target_layers")
    if count is not None and trained_for is not None and trained_for != count:
        problem = f"it was trained for a target of {trained_for} layers, this one has {count}"
        yield Finding("error", "drafter", problem, mend)
    mask = own.get("mask_token_id")
    if mask is None or not 0 <= mask < target.get("vocab_size", mask + 1):
        yield Finding("error", "drafter", f"its dflash_config.mask_token_id is {mask}", mend)


def _media(settings: Settings, target: Mapping[str, Any]) -> Iterator[Finding]:
    if not target.get("vision_config") or text_only(settings.engine):
        return
    domains = settings.engine.get("allowed_media_domains")
    if not domains:
        yield Finding(
            "error",
            "engine.allowed_media_domains",
            "any client can make the server fetch from any address",
            "list the domains that images may come from, or set limit_mm_per_prompt: {image: 0, audio: 0, video: 0}",
        )
    backend = (settings.speculation.attention_backend or "").upper()
    if settings.speculates and is_gemma(text_config(target).get("model_type")) and backend == "FLASH_ATTN":
        yield Finding(
            "warning",
            "speculation.attention_backend",
            "with images vLLM takes FLASH_ATTN for Gemma's drafter only where FlashAttention 4 runs",
            "set TRITON_ATTN if the engine refuses to start",
        )


def _memory(settings: Settings, memory: Estimate) -> Iterator[Finding]:
    longest = memory.fits[-1]
    if longest.requests < 1:
        missing = longest.admitted_bytes - memory.kv_bytes
        yield Finding(
            "error" if missing > SLACK * memory.gpu_bytes else "warning",
            "engine.max_model_len",
            f"one request of {longest.tokens} tokens needs {longest.admitted_bytes / GIB:.1f} GiB of KV cache, and "
            f"about {max(0, memory.kv_bytes) / GIB:.1f} GiB are left beside weights and activations (estimated)",
            "lower max_model_len or max_num_batched_tokens, raise hardware.gpus_per_replica, or take larger GPUs",
        )
        return
    shortest = memory.fits[0]
    limit = settings.limits.max_concurrent_requests
    if shortest.requests < limit:
        yield Finding(
            "warning",
            "limits.max_concurrent_requests",
            f"{limit}, and about {shortest.requests} requests of {shortest.tokens} tokens fit at once (estimated); the "
            "others wait, or vLLM stops and recomputes some",
            f"lower it and engine.max_num_seqs to {shortest.requests} if requests are that long",
        )
