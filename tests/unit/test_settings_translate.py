"""From settings to keyword arguments of Ray's LLMConfig."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dflash_serve.settings import (
    Cluster,
    SettingsError,
    check_engine_arguments,
    check_speculation_options,
    llm_config_kwargs,
    profile_names,
    resolve,
)
from dflash_serve.speculation.config import batch_size_schedule

SOURCE = Path(__file__).resolve().parents[2]


def kwargs_of(args: dict[str, Any]) -> dict[str, Any]:
    return llm_config_kwargs(resolve(args, Cluster(cpus=2, gpus={}), read_config=lambda _: None).settings)


def test_the_bundled_pair_on_cpu() -> None:
    kwargs = kwargs_of({"profile": "smollm2-cpu"})
    assert kwargs["model_loading_config"] == {
        "model_id": "smollm2-135m-instruct",
        "model_source": "demo:smollm2-135m-instruct",
    }
    assert kwargs["accelerator_config"] == {"kind": "cpu"}
    assert "accelerator_type" not in kwargs
    assert kwargs["placement_group_config"] == {"bundles": [{"CPU": 0.5}]}
    environment = kwargs["runtime_env"]["env_vars"]
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert environment["OMP_NUM_THREADS"] == "2"
    assert kwargs["engine_kwargs"]["speculative_config"] == {
        "method": "dflash",
        "model": "demo:smollm2-135m-dflash",
        "num_speculative_tokens": 5,
        "num_speculative_tokens_per_batch_size": batch_size_schedule((0, 2, 3, 5), 16),
    }


@pytest.mark.parametrize("accelerator", ["B300", "B200", "H200"])
def test_gemma_as_its_drafters_card_runs_it(accelerator: str) -> None:
    kwargs = kwargs_of({"profile": f"gemma4-31b-{accelerator.lower()}", "drafter_revision": "abc"})
    assert kwargs["accelerator_type"] == accelerator
    assert kwargs["placement_group_config"] == {"bundles": [{"GPU": 1, "CPU": 8}], "strategy": "STRICT_PACK"}
    engine = kwargs["engine_kwargs"]
    assert engine["attention_backend"] == "TRITON_ATTN"
    assert engine["max_num_batched_tokens"] == 32768
    assert engine["speculative_config"] == {
        "method": "dflash",
        "model": "z-lab/gemma-4-31B-it-DFlash",
        "revision": "abc",
        "num_speculative_tokens": 15,
        "num_speculative_tokens_per_batch_size": batch_size_schedule((0, 1, 3, 5, 7, 15), engine["max_num_seqs"]),
        "attention_backend": "FLASH_ATTN",
    }
    assert not any(name.startswith(("VLLM_CPU", "OMP")) for name in kwargs["runtime_env"]["env_vars"])


def test_the_adaptive_engine_names_each_choice_and_brings_its_own_scheduler() -> None:
    engine = kwargs_of({"profile": "gemma4-31b-h200"})["engine_kwargs"]
    schedule = engine["speculative_config"]["num_speculative_tokens_per_batch_size"]
    assert [count for _, _, count in schedule] == [15, 7, 5, 3, 1, 0]
    assert (schedule[0][0], schedule[-1][1]) == (1, 42)
    assert engine["additional_config"]["dflash_serve"]["draft_token_choices"] == [0, 1, 3, 5, 7, 15]
    for name in ("scheduler_cls", "worker_cls"):
        module, _, attribute = engine[name].rpartition(".")
        assert (SOURCE / f"{module.replace('.', '/')}.py").read_text().count(f"class {attribute}(") == 1


def test_a_lower_limit_ends_the_choices() -> None:
    engine = kwargs_of({"profile": "gemma4-31b-h200", "speculation": {"max_draft_tokens": 6}})["engine_kwargs"]
    assert engine["additional_config"]["dflash_serve"]["draft_token_choices"] == [0, 1, 3, 5, 6]
    assert engine["speculative_config"]["num_speculative_tokens"] == 6


def test_a_fixed_draft_length_leaves_the_scheduler_to_vllm() -> None:
    engine = kwargs_of({"profile": "smollm2-cpu", "speculation": {"mode": "fixed"}})["engine_kwargs"]
    assert engine["speculative_config"]["num_speculative_tokens"] == 5
    assert not {"scheduler_cls", "worker_cls", "additional_config"} & engine.keys()
    assert "num_speculative_tokens_per_batch_size" not in engine["speculative_config"]


def test_several_gpus_a_replica_stay_on_one_node() -> None:
    kwargs = kwargs_of({"profile": "gemma4-31b-h200", "hardware": {"gpus_per_replica": 2}})
    assert kwargs["engine_kwargs"]["tensor_parallel_size"] == 2
    placement = kwargs["placement_group_config"]
    assert placement == {"bundles": [{"GPU": 1, "CPU": 8}, {"GPU": 1}], "strategy": "STRICT_PACK"}


def test_any_gpu_names_no_type() -> None:
    kwargs = kwargs_of({"profile": "gemma4-31b-h200", "hardware": {"accelerator": "gpu"}})
    assert "accelerator_type" not in kwargs
    assert kwargs["placement_group_config"]["bundles"][0]["GPU"] == 1


def test_further_options_reach_the_speculative_config() -> None:
    speculation = {"options": {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 4.0}}
    config = kwargs_of({"speculation": speculation})["engine_kwargs"]["speculative_config"]
    assert (config["rejection_sample_method"], config["synthetic_acceptance_length"]) == ("synthetic", 4.0)


def test_output_is_bounded_beside_other_generation_defaults() -> None:
    args = {"limits": {"max_output_tokens": 64}, "engine": {"override_generation_config": {"temperature": 0.5}}}
    engine = kwargs_of(args)["engine_kwargs"]
    assert engine["override_generation_config"] == {"temperature": 0.5, "max_new_tokens": 64}
    unbounded = kwargs_of({"limits": {"max_output_tokens": None}})["engine_kwargs"]
    assert "override_generation_config" not in unbounded


@pytest.mark.parametrize("profile", profile_names())
def test_serve_refuses_after_us_scales_and_waits_for_streams(profile: str) -> None:
    limits = {"max_concurrent_requests": 500, "max_stream_seconds": 77.5}
    deployment = kwargs_of({"profile": profile, "limits": limits})["deployment_config"]
    assert deployment["max_ongoing_requests"] > 500
    assert deployment["graceful_shutdown_timeout_s"] == 77.5
    assert deployment["autoscaling_config"]["target_ongoing_requests"] < 500


def test_scaled_to_zero_it_still_starts_with_one() -> None:
    scaling = kwargs_of({"autoscaling": {"min_replicas": 0}})["deployment_config"]["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["initial_replicas"]) == (0, 1)
    stated = {"min_replicas": 0, "initial_replicas": 0}
    assert kwargs_of({"autoscaling": stated})["deployment_config"]["autoscaling_config"]["initial_replicas"] == 0


def test_what_clients_may_not_do_is_off_whatever_the_node_says() -> None:
    kwargs = kwargs_of({"limits": {"max_n": 3}})
    environment = kwargs["runtime_env"]["env_vars"]
    assert environment["VLLM_MAX_N_SEQUENCES"] == "3"
    for name in ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_MEDIA_URL_ALLOW_REDIRECTS"):
        assert environment[name] == "0"
    engine = kwargs["engine_kwargs"]
    for name in ("trust_remote_code", "enable_prompt_embeds", "trust_request_chat_template", "enable_log_requests"):
        assert engine[name] is False
    assert engine["disable_fastapi_docs"] is True
    # an empty list would allow every domain
    assert engine["allowed_media_domains"] == ["media.invalid"]


def test_unknown_names_of_vllm_get_the_nearest() -> None:
    known = {"max_model_len", "enforce_eager", "synthetic_acceptance_length"}
    with pytest.raises(SettingsError) as caught:
        check_engine_arguments({"max_modl_len": 1, "enforce-eager": True, "zzz": 0, "max_model_len": 1}, known)
    assert caught.value.problems == [
        "engine.enforce-eager: vLLM has no such argument; did you mean enforce_eager?",
        "engine.max_modl_len: vLLM has no such argument; did you mean max_model_len?",
        "engine.zzz: vLLM has no such argument; see vLLM's engine arguments, with underscores",
    ]
    with pytest.raises(SettingsError, match=r"speculation\.options\.synthetic_length: .* synthetic_acceptance_length"):
        check_speculation_options({"synthetic_length": 3}, known)


def test_traces_go_through_the_engine() -> None:
    metrics = {"otlp_traces_endpoint": "http://collector:4318/v1/traces", "otlp_traces_protocol": "http/protobuf"}
    kwargs = kwargs_of({"profile": "smollm2-cpu", "metrics": metrics})
    assert kwargs["engine_kwargs"]["otlp_traces_endpoint"] == metrics["otlp_traces_endpoint"]
    assert kwargs["runtime_env"]["env_vars"]["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] == "http/protobuf"
    assert "otlp_traces_endpoint" not in kwargs_of({"profile": "smollm2-cpu"})["engine_kwargs"]
