from pathlib import Path
from typing import Any

import pytest
import yaml

from dflash_serve.settings import (
    Cluster,
    SettingsError,
    check_engine_arguments,
    llm_config_kwargs,
    profile_names,
    resolve,
)
from dflash_serve.settings.translate import SERVE_HEADROOM

NO_GPU = Cluster(cpus=2, gpus={})
BLOCK_16 = {"block_size": 16}


def settings_of(args: dict[str, Any], cluster: Cluster = NO_GPU) -> Any:
    return resolve(args, cluster, read_config=lambda model: BLOCK_16).settings


def problems_of(args: dict[str, Any], cluster: Cluster = NO_GPU) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        resolve(args, cluster, read_config=lambda model: BLOCK_16)
    return caught.value.problems


@pytest.mark.parametrize(
    ("gpus", "profile"),
    [
        ({}, "smollm2-cpu"),
        ({"B300": 8}, "gemma4-31b-b300"),
        ({"B200": 1}, "gemma4-31b-b200"),
        ({"H200": 4}, "gemma4-31b-h200"),
        ({"H200": 4, "B300": 1}, "gemma4-31b-b300"),
    ],
)
def test_auto_takes_what_the_cluster_has(gpus: dict[str, int], profile: str) -> None:
    resolved = resolve({}, Cluster(cpus=8, gpus=gpus), read_config=lambda model: BLOCK_16)
    assert resolved.profile == profile
    assert "the cluster has" in resolved.reason


def test_auto_does_not_guess_for_an_unknown_gpu() -> None:
    cluster = Cluster(cpus=8, gpus={"H100": 2})
    (problem,) = problems_of({}, cluster)
    assert problem.startswith("profile: auto finds 2 x H100 and no profile for it")
    own = {"target": "Qwen/Qwen3-4B", "drafter": "z-lab/Qwen3-4B-DFlash", "hardware": {"accelerator": "H100"}}
    assert settings_of(own, cluster).target == "Qwen/Qwen3-4B"


@pytest.mark.parametrize("profile", profile_names())
def test_every_profile_stands_alone(profile: str) -> None:
    settings = settings_of({"profile": profile})
    kwargs = llm_config_kwargs(settings)
    assert kwargs["engine_kwargs"]["speculative_config"]["method"] == "dflash"
    assert kwargs["engine_kwargs"]["trust_remote_code"] is False
    assert kwargs["deployment_config"]["autoscaling_config"]["target_ongoing_requests"] < 1000, (
        "Ray's default never scales"
    )
    gpu = kwargs.get("accelerator_type")
    assert (gpu is None) == (profile == "smollm2-cpu")
    if gpu:
        assert kwargs["placement_group_config"]["bundles"] == [{"GPU": 1, "CPU": 8}]


def test_gemma_profiles_are_the_cards() -> None:
    fixed = {"profile": "gemma4-31b-b300", "speculation": {"mode": "fixed"}}
    engine = llm_config_kwargs(settings_of(fixed))["engine_kwargs"]
    assert engine["max_num_batched_tokens"] == 32768
    assert engine["attention_backend"] == "TRITON_ATTN"
    assert engine["speculative_config"] == {
        "method": "dflash",
        "model": "z-lab/gemma-4-31B-it-DFlash",
        "num_speculative_tokens": 15,
        "attention_backend": "FLASH_ATTN",
    }


def test_own_settings_win_section_by_section() -> None:
    settings = settings_of(
        {
            "profile": "smollm2-cpu",
            "speculation": {"max_draft_tokens": 3, "options": {"rejection_sample_method": "block"}},
            "engine": {"max_num_seqs": 4},
            "limits": {"max_output_tokens": 99},
        }
    )
    engine = llm_config_kwargs(settings)["engine_kwargs"]
    assert engine["speculative_config"]["num_speculative_tokens"] == 3
    assert engine["speculative_config"]["rejection_sample_method"] == "block"
    assert (engine["max_num_seqs"], engine["max_model_len"]) == (4, 2048)
    assert engine["override_generation_config"] == {"max_new_tokens": 99}


def test_speculation_off_loads_no_drafter() -> None:
    engine = llm_config_kwargs(settings_of({"speculation": {"mode": "off"}}))["engine_kwargs"]
    assert "speculative_config" not in engine
    assert "per_request_spec_decode_metrics" not in engine


def test_serves_limit_lies_above_ours() -> None:
    deployment = llm_config_kwargs(settings_of({"limits": {"max_concurrent_requests": 5}}))["deployment_config"]
    assert deployment["max_ongoing_requests"] == 5 + SERVE_HEADROOM


def test_tensor_parallel_reserves_one_bundle_a_gpu() -> None:
    kwargs = llm_config_kwargs(settings_of({"profile": "gemma4-31b-h200", "hardware": {"gpus_per_replica": 2}}))
    assert kwargs["engine_kwargs"]["tensor_parallel_size"] == 2
    assert kwargs["placement_group_config"]["bundles"] == [{"GPU": 1, "CPU": 8}, {"GPU": 1}]


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ({"profle": "auto"}, "profle: unknown setting; did you mean profile?"),
        (
            {"speculation": {"max_draft_token": 3}},
            "speculation.max_draft_token: unknown setting; did you mean max_draft_tokens?",
        ),
        (
            {"num_speculative_tokens": 7},
            "num_speculative_tokens: unknown setting; it is speculation.max_draft_tokens here",
        ),
        ({"auth": {"keys": ["sk-1"]}}, "auth.keys: unknown setting; keys do not belong into a configuration"),
        (
            {"speculation": {"max_draft_tokens": 0}},
            "speculation.max_draft_tokens: input should be greater than or equal to 1; it is 0",
        ),
        (
            {"speculation": {"max_draft_tokens": 16}},
            "speculation.max_draft_tokens: 16 is more than the drafter's block allows; set 15 or less",
        ),
        (
            {"speculation": {"mode": "maybe"}},
            "speculation.mode: input should be 'adaptive', 'fixed' or 'off'; it is 'maybe'",
        ),
        ({"autoscaling": {"min_replicas": 4}}, "autoscaling: max_replicas (1) is below min_replicas (4)"),
        ({"profile": "gemma4-31b-b30"}, "profile: unknown profile 'gemma4-31b-b30'; did you mean gemma4-31b-b300?"),
        ({"profile": "./none.yaml"}, "profile: there is no file ./none.yaml"),
        ({"profile": 7}, "profile: must be a name or a path; it is 7"),
        ({"engine": {"speculative_config": {}}}, "engine.speculative_config: not here; set drafter and speculation"),
        ({"engine": {"api_key": "sk-1"}}, "engine.api_key: not here; name the variable"),
        ({"hardware": {"gpus_per_replica": 2}}, "hardware.gpus_per_replica: not used with accelerator: cpu"),
        ({"limits": {"max_n": "many"}}, "limits.max_n: input should be a valid integer"),
        ({"target": ""}, "target: string should have at least 1 character"),
        ({"drafter": None}, "drafter: missing; name the target's DFlash drafter or set speculation.mode: off"),
    ],
)
def test_bad_settings_name_the_field_and_the_mend(args: dict[str, Any], problem: str) -> None:
    (found,) = problems_of(args)
    assert found.startswith(problem)


def test_all_problems_come_at_once() -> None:
    assert (
        len(problems_of({"limts": {}, "routing": {"policy": "random"}, "metrics": {"acceptance_window_seconds": 0}}))
        == 3
    )


def test_a_profile_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"target": "me/model", "speculation": {"mode": "off"}}))
    resolved = resolve({"profile": str(path)}, NO_GPU)
    assert resolved.settings.served_name == "me/model"
    path.write_text("- a list")
    (problem,) = problems_of({"profile": str(path)})
    assert "must hold settings by name" in problem


def test_unknown_engine_arguments_get_the_nearest_name() -> None:
    known = {"max_model_len", "max_num_seqs", "gpu_memory_utilization"}
    check_engine_arguments({"max_model_len": 1}, known)
    with pytest.raises(
        SettingsError, match=r"engine\.max_modl_len: vLLM has no such argument; did you mean max_model_len\?"
    ):
        check_engine_arguments({"max_modl_len": 1}, known)


def test_settings_are_documented() -> None:
    from dflash_serve.settings.model import Settings

    sections: list[Any] = [Settings]
    while sections:
        section = sections.pop()
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
            if hasattr(field.annotation, "model_fields"):
                sections.append(field.annotation)
