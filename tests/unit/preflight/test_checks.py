from __future__ import annotations

from typing import Any

import pytest

from benchmarks.gemma4_shapes import drafter_config, target_config
from dflash_serve.hardware import GPU_MEMORY_GB
from dflash_serve.preflight.checks import NON_CAUSAL_BACKENDS, Finding, Surroundings, check, v1_reasons
from dflash_serve.preflight.memory import Estimate, Fit, estimate
from dflash_serve.settings import Cluster, Settings, resolve

TARGET, DRAFTER = target_config(tiny=False), drafter_config(tiny=False)
PINNED = {"target_revision": "0" * 40, "drafter_revision": "f" * 40}
SEQUENCE_PARALLEL = {"compilation_config": {"pass_config": {"enable_sp": True, "fuse_gemm_comms": False}}}
HERE = Surroundings(
    has_vllm=True,
    plugin_installed=True,
    plugins_allowed=None,
    has_logits_processors=False,
    runner=None,
    gpu_bytes=None,
)


def gemma(**args: Any) -> Settings:
    values = {"profile": "gemma4-31b-h200"} | PINNED | args
    return resolve(values, Cluster(cpus=8, gpus={}), read_config=lambda _: None).settings


def here(**changes: Any) -> Surroundings:
    return Surroundings(**(vars(HERE) | changes))


def found(
    settings: Settings, target: dict[str, Any] = TARGET, drafter: dict[str, Any] = DRAFTER, at: Surroundings = HERE
) -> list[Finding]:
    return check(settings, target, drafter, at)


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, [str(finding) for finding in findings]
    return findings[0]


@pytest.mark.parametrize("profile", ["gemma4-31b-b200", "gemma4-31b-b300", "gemma4-31b-h200"])
def test_nothing_is_wrong_with_a_pinned_gemma_profile(profile: str) -> None:
    assert found(gemma(profile=profile)) == []


@pytest.mark.parametrize(
    ("at", "words"),
    [
        (
            here(plugin_installed=False),
            "drafter: the plugin .* is not installed as a package.*; pip install dflash-serve",
        ),
        (here(plugins_allowed="other"), "VLLM_PLUGINS: .*VLLM_PLUGINS=other leaves it out; add dflash_serve"),
    ],
)
def test_gemma_needs_the_plugin(at: Surroundings, words: str) -> None:
    finding = only(found(gemma(), at=at))
    assert finding.severity == "error"
    import re

    assert re.search(words, str(finding))
    qwen = TARGET | {"model_type": "qwen3", "layer_types": None}
    assert found(gemma(), target=qwen, at=at) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 4096}, "its hidden_size is 4096, the target's 5376"),
        ({"vocab_size": 32000}, "its vocab_size is 32000, the target's 262144"),
        ({"num_target_layers": 48}, "trained for a target of 48 layers, this one has 60"),
        (
            {"dflash_config": {"mask_token_id": 4, "target_layer_ids": [1, 60]}},
            r"target_layer_ids \[1, 60\] are not all",
        ),
        ({"dflash_config": {"mask_token_id": 4}}, "has no dflash_config.target_layer_ids"),
        ({"dflash_config": {"mask_token_id": 262144, "target_layer_ids": [1]}}, "mask_token_id is 262144"),
        ({"is_causal": True}, "makes every layer causal"),
        ({"speculators_model_type": "dflash", "sliding_window_non_causal": False}, "reads as causal in every layer"),
    ],
)
def test_a_drafter_that_does_not_fit_is_an_error(change: dict[str, Any], words: str) -> None:
    import re

    finding = only(found(gemma(), drafter=DRAFTER | change))
    assert (finding.severity, finding.field) == ("error", "drafter")
    assert re.search(words, finding.problem)
    assert finding.mend


def test_mixed_layers_need_the_v2_runner() -> None:
    on_cpu = gemma(hardware={"accelerator": "cpu"})
    finding = only(found(on_cpu))
    assert finding.severity == "error"
    assert "mixes sliding and full layers" in finding.problem
    full = DRAFTER | {"layer_types": ["full_attention"] * 5}
    assert found(on_cpu, drafter=full) == []
    error, warning = found(gemma(), at=here(runner="0"))
    assert (error.severity, warning.severity) == ("error", "warning")
    assert warning.field == "VLLM_USE_V2_MODEL_RUNNER"


@pytest.mark.parametrize(
    ("settings", "at", "reasons"),
    [
        (gemma(), HERE, []),
        (gemma(), here(runner="1"), []),
        (gemma(engine={"enable_dbo": True}), HERE, ["engine.enable_dbo"]),
        (gemma(engine={"logits_processors": ["a:b"]}), HERE, ["engine.logits_processors"]),
        (gemma(engine={"compilation_config": {"mode": 1}}), HERE, ["engine.compilation_config.mode"]),
        (gemma(engine=SEQUENCE_PARALLEL), HERE, []),
        (
            gemma(engine=SEQUENCE_PARALLEL, hardware={"gpus_per_replica": 2}),
            HERE,
            ["engine.compilation_config.pass_config.enable_sp"],
        ),
        (
            gemma(),
            here(has_logits_processors=True),
            ["an installed logits processor (entry point vllm.logits_processors)"],
        ),
        (gemma(hardware={"accelerator": "cpu"}), HERE, ["accelerator: cpu"]),
    ],
)
def test_why_the_v1_runner_would_run(settings: Settings, at: Surroundings, reasons: list[str]) -> None:
    assert v1_reasons(settings, at) == reasons


def test_a_backend_without_non_causal_attention() -> None:
    finding = only(found(gemma(speculation={"attention_backend": "TREE_ATTN"})))
    assert finding.severity == "error"
    assert "FLASH_ATTN" in finding.mend


def test_a_token_budget_that_caps_concurrency() -> None:
    # 15 draft tokens: 16 verified and 15 slots for the drafter, each request and step
    finding = only(found(gemma(engine={"max_num_batched_tokens": 1024, "max_num_seqs": 64})))
    assert "1024 lets 33 requests run at once, not max_num_seqs (64)" in finding.problem
    assert "raise it to 1984" in finding.mend
    assert found(gemma(engine={"max_num_batched_tokens": 1984, "max_num_seqs": 64})) == []


def test_prefix_caching_that_never_finds_anything() -> None:
    finding = only(found(gemma(engine={"prefix_cache_retention_interval": None})))
    assert finding.field == "engine.prefix_cache_retention_interval"
    assert found(gemma(engine={"prefix_cache_retention_interval": None, "enable_prefix_caching": False})) == []


def test_models_on_the_hub_are_to_be_pinned() -> None:
    findings = found(gemma(target_revision="main", drafter_revision=None))
    assert [finding.field for finding in findings] == ["target_revision", "drafter_revision"]
    local = gemma(target="/models/gemma", drafter="/models/drafter", target_revision=None, drafter_revision=None)
    assert found(local) == []


def test_images_are_opt_in_and_bounded() -> None:
    target = {"text_config": TARGET, "vision_config": {"hidden_size": 1152}}
    images = {"limit_mm_per_prompt": {"image": 4, "audio": 0, "video": 0}}
    assert found(gemma(), target=target) == []
    (finding,) = found(gemma(engine=images | {"allowed_media_domains": ["example.com"]}), target=target)
    assert (finding.severity, finding.field) == ("warning", "speculation.attention_backend")
    finding = found(gemma(engine=images | {"allowed_media_domains": None}), target=target)[0]
    assert (finding.severity, finding.field) == ("error", "engine.allowed_media_domains")


def test_synthetic_acceptance_has_no_cpu_sampler() -> None:
    speculation = {"max_draft_tokens": 7, "options": {"rejection_sample_method": "synthetic"}}
    settings = resolve({"profile": "smollm2-cpu", "speculation": speculation}, Cluster(cpus=2, gpus={})).settings
    assert only(check(settings, None, None, HERE)).severity == "error"


def estimate_of(requests: int, *, missing_bytes: int = 0) -> Estimate:
    fit = Fit(tokens=4096, held_bytes=10**9, admitted_bytes=10**10, requests=requests)
    return Estimate(10**11, 92 * 10**9, 0, 0, 0, 10**10 - missing_bytes, 1, 1, (fit,))


def test_memory() -> None:
    assert check(gemma(), TARGET, DRAFTER, HERE, estimate_of(64)) == []
    few = only(check(gemma(), TARGET, DRAFTER, HERE, estimate_of(20)))
    assert (few.severity, few.field) == ("warning", "limits.max_concurrent_requests")
    # the estimate may be wrong by a tenth of the GPU
    for missing_bytes, severity in ((10**9, "warning"), (2 * 10**10, "error")):
        none = only(check(gemma(), TARGET, DRAFTER, HERE, estimate_of(0, missing_bytes=missing_bytes)))
        assert (none.severity, none.field) == (severity, "engine.max_model_len")


@pytest.mark.parametrize("profile", ["gemma4-31b-b200", "gemma4-31b-b300", "gemma4-31b-h200"])
def test_no_more_requests_at_once_than_fit_by_our_own_estimate(profile: str) -> None:
    settings = resolve({"profile": profile} | PINNED, Cluster(cpus=1, gpus={})).settings
    size_gb = GPU_MEMORY_GB[settings.hardware.accelerator]
    assert size_gb is not None
    memory = estimate(settings, TARGET, DRAFTER, size_gb * 10**9)
    assert check(settings, TARGET, DRAFTER, HERE, memory) == []
    assert settings.engine["max_num_seqs"] == settings.limits.max_concurrent_requests
    # above that Serve starts another replica, so the limit must leave room for a burst meanwhile
    assert settings.limits.max_concurrent_requests > settings.autoscaling.target_ongoing_requests


def test_vllms_backends_with_non_causal_attention() -> None:
    import ast
    from pathlib import Path

    import vllm
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    able = set()
    for backend in AttentionBackendEnum:
        module, _, name = (backend.value or "").rpartition(".")
        # read, not imported: some need packages that a CPU install does not have
        source = Path(vllm.__path__[0]).parent.joinpath(*module.split(".")).with_suffix(".py")
        if ".mla." in module or not source.is_file():
            continue
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ClassDef) and node.name == name:
                methods = [method for method in node.body if isinstance(method, ast.FunctionDef)]
                if any(m.name == "supports_non_causal" and "return True" in ast.unparse(m) for m in methods):
                    able.add(backend.name)
    assert able == set(NON_CAUSAL_BACKENDS)
