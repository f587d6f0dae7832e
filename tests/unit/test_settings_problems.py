"""What a user reads when settings are wrong: the field, what is wrong with it, and the mend."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from dflash_serve import demo
from dflash_serve.settings import Cluster, SettingsError, resolve

SECRET = "sk-0123456789"


def problems(args: dict[str, Any]) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        resolve(args, Cluster(cpus=2, gpus={}), read_config=lambda _: None)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


BAD: list[tuple[dict[str, Any], str]] = [
    ({"limits": {"max_output_token": 1}}, "limits.max_output_token: unknown setting; did you mean max_output_tokens?"),
    ({"metrics": {"zzz": 1}}, "metrics.zzz: unknown setting; known here: acceptance_window_seconds, traffic_classes"),
    ({"metrics": {"traffic_classes": ["Chat"]}}, "metrics.traffic_classes: each must begin with a letter and hold at"),
    ({"metrics": {"traffic_classes": [f"c{i}" for i in range(17)]}}, "metrics.traffic_classes: list should have at"),
    (
        {"metrics": {"traffic_class_header": "X-Class"}},
        "metrics.traffic_class_header: must be a header's name in lower",
    ),
    ({"metrics": {"otlp_traces_endpoint": "collector:4317"}}, "metrics.otlp_traces_endpoint: must be a URL such as"),
    (
        {"metrics": {"traffic_class_keys": {"a" * 64: "batch"}}},
        "metrics.traffic_class_keys: no class 'batch'; add it to metrics.traffic_classes",
    ),
    ({"engine": {"otlp_traces_endpoint": "http://x"}}, "engine.otlp_traces_endpoint: not here; set metrics.otlp"),
    ({"model": "a/b"}, "model: unknown setting; it is target here"),
    ({"target": None}, "target: input should be a valid string; it is None"),
    (
        {"target": "demo:gpt-5", "drafter": demo.DRAFTER},
        "target: no bundled model 'demo:gpt-5'; the bundled one is demo:smollm2-135m-instruct",
    ),
    ({"drafter": "demo:x"}, "drafter: no bundled model 'demo:x'; the bundled one is demo:smollm2-135m-dflash"),
    ({"drafter": "s3://b/d"}, "drafter: a bucket URL does not work here; use a hub name"),
    ({"model_id": "my model"}, "model_id: must begin with a letter or digit and hold letters, digits and ._/:@+- only"),
    ({"profile": "zzz"}, "profile: unknown profile 'zzz'; known: auto, gemma4-31b-b200"),
    ({"profile": "/dev/null/x.yaml"}, "profile: cannot read /dev/null/x.yaml: Not a directory; mend"),
    (
        {"speculation": {"max_draft_tokens": "7"}},
        "speculation.max_draft_tokens: input should be a valid integer; it is",
    ),
    (
        {"speculation": {"num_draft_tokens": 7}},
        "speculation.num_draft_tokens: unknown setting; it is max_draft_tokens here",
    ),
    (
        {"speculation": {"draft_token_choices": [3, 0]}},
        "speculation.draft_token_choices: must rise from 0 or more to 1",
    ),
    ({"speculation": {"draft_token_choices": [0]}}, "speculation.draft_token_choices: must rise from 0 or more to 1"),
    (
        {"speculation": {"draft_token_choices": [-1, 3]}},
        "speculation.draft_token_choices: must rise from 0 or more to 1",
    ),
    (
        {"speculation": {"step_costs": "h900"}},
        "speculation.step_costs: no surface 'h900'; known: gemma4-31b-h200, generic",
    ),
    (
        {"speculation": {"step_costs": "/no/such.json"}},
        "speculation.step_costs: cannot read /no/such.json: No such file",
    ),
    ({"speculation": {"exploration": 0.5}}, "speculation.exploration: input should be less than or equal to 0.1"),
    ({"engine": {"scheduler_cls": "a.B"}}, "engine.scheduler_cls: adaptive speculation sets it; set speculation.mode"),
    (
        {"speculation": {"options": {"num_speculative_tokens_per_batch_size": [[1, 4, 3]]}}},
        "speculation.options.num_speculative_tokens_per_batch_size: adaptive speculation sets it",
    ),
    ({"speculation": {"options": {"method": "eagle"}}}, "speculation.options.method: not here; it is always dflash"),
    ({"speculation": {"options": {"model": "a"}}}, "speculation.options.model: not here; set drafter"),
    ({"hardware": {"accelerator": "B30"}}, "hardware.accelerator: unknown accelerator; set one of cpu, gpu, A10G"),
    ({"hardware": {"kv_cache_gib": 1.5}}, "hardware.kv_cache_gib: input should be a valid integer; it is 1.5"),
    ({"hardware": {"cpus_per_replica": 0}}, "hardware.cpus_per_replica: input should be greater than 0; it is 0"),
    (
        {"profile": "gemma4-31b-h200", "hardware": {"kv_cache_gib": 8}},
        "hardware.kv_cache_gib: for accelerator: cpu only; set engine.gpu_memory_utilization instead",
    ),
    (
        {"profile": "gemma4-31b-h200", "hardware": {"omp_threads": 8}},
        "hardware.omp_threads: for accelerator: cpu only; leave it out",
    ),
    (
        {"autoscaling": {"max_replicas": 2, "initial_replicas": 3}},
        "autoscaling.initial_replicas: 3 is not between 1 and 2; change it or leave it out",
    ),
    (
        {"autoscaling": {"max_replicas": 2, "target_ongoing_requests": 32}},
        "autoscaling.target_ongoing_requests: 32 is not below limits.max_concurrent_requests (32), so replicas refuse",
    ),
    (
        {"autoscaling": {"upscale_delay_s": float("inf")}},
        "autoscaling.upscale_delay_s: input should be a finite number",
    ),
    ({"limits": {"max_n": True}}, "limits.max_n: input should be a valid integer; it is True"),
    ({"limits": 5}, "limits: input should be a valid dictionary"),
    ({"engine": {"model": "x"}}, "engine.model: not here; set target"),
    ({"engine": {"served_model_name": "x"}}, "engine.served_model_name: not here; set model_id"),
    ({"engine": {"middleware": []}}, "engine.middleware: not here; the gateway is the middleware"),
    ({"engine": {"tensor_parallel_size": 2}}, "engine.tensor_parallel_size: not here; set hardware.gpus_per_replica"),
    ({"engine": {"port": 1}}, "engine.port: not here; Ray Serve listens, not vLLM; see http_options"),
    (
        {"engine": {"override_generation_config": {"max_new_tokens": 5}}},
        "engine.override_generation_config.max_new_tokens: not here; set limits.max_output_tokens",
    ),
    ({"engine": {"override_generation_config": 5}}, "engine.override_generation_config: must be a mapping"),
]


@pytest.mark.parametrize(("args", "message"), BAD, ids=[message[:50] for _, message in BAD])
def test_a_bad_value_is_named_with_its_mend(args: dict[str, Any], message: str) -> None:
    (problem,) = problems(args)
    assert problem.startswith(message)


@pytest.mark.parametrize(
    "args",
    [
        {"api_key": SECRET},
        {"auth": {"keys": [SECRET]}},
        {"auth": {"api_key": SECRET}},
        {"auth": SECRET},
        {"auth": {"keys_env": SECRET}},
        {"auth": {"keys_file": [SECRET]}},
        {"auth": {"anonymous": SECRET}},
        {"engine": {"api_key": [SECRET]}},
        {"engine": {"hf_token": SECRET}},
    ],
)
def test_a_key_in_plain_text_is_refused_and_not_repeated(args: dict[str, Any]) -> None:
    (problem,) = problems(args)
    assert SECRET not in problem
    assert problem.startswith(next(iter(args)))


def test_all_problems_come_at_once() -> None:
    args = {"limits": {"max_n": 0, "maxn": 1}, "engine": {"model": "x", "host": "y"}, "routing": {"policy": 3}}
    fields = [problem.partition(":")[0] for problem in problems(args)]
    assert sorted(fields) == ["engine.host", "engine.model", "limits.max_n", "limits.maxn", "routing.policy"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", "is not YAML"),
        (b"\xff\xfe\x00", "it is not UTF-8 text"),
        (
            b"profile: smollm2-cpu\ntarget: a/b\ndrafter: a/c",
            "profile: unknown setting; a profile cannot stand on another",
        ),
        (b"drafter: a/c", "target: missing; set it, or name a profile that has it"),
    ],
)
def test_a_broken_profile_of_ones_own(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_bytes(content)
    (problem,) = problems({"profile": str(path)})
    assert message in problem


def test_the_error_survives_the_way_between_processes() -> None:
    copy = pickle.loads(pickle.dumps(SettingsError(["a: b; c", "d: e; f"])))
    assert (str(copy), copy.problems) == ("a: b; c\nd: e; f", ["a: b; c", "d: e; f"])


def test_a_key_given_for_its_digest_is_not_repeated() -> None:
    (problem,) = problems({"metrics": {"traffic_classes": ["batch"], "traffic_class_keys": {"sk-secret": "batch"}}})
    assert problem.startswith("metrics.traffic_class_keys: every name must be a SHA-256 in hex, not a key; use")
    assert "sk-secret" not in problem
