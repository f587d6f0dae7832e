"""Our names for things of Ray and vLLM against the installed ones (imports vllm: seconds)."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from dflash_serve.hardware import GPU_MEMORY_GB
from dflash_serve.settings import (
    Cluster,
    SettingsError,
    check_engine_arguments,
    check_speculation_options,
    llm_config_kwargs,
    profile_names,
    resolve,
)
from dflash_serve.settings.parse import OWNED_ENGINE_ARGUMENTS, OWNED_SPECULATION_OPTIONS

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def engine_names() -> set[str]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs

    return {field.name for arguments in (AsyncEngineArgs, FrontendArgs) for field in dataclasses.fields(arguments)}


@pytest.fixture(scope="module")
def speculation_names() -> set[str]:
    from vllm.config import SpeculativeConfig

    return {field.name for field in dataclasses.fields(SpeculativeConfig)}


def kwargs_of(profile: str, **args: Any) -> dict[str, Any]:
    args["profile"] = profile
    return llm_config_kwargs(resolve(args, Cluster(cpus=2, gpus={}), read_config=lambda _: None).settings)


@pytest.mark.parametrize("profile", profile_names())
def test_vllm_has_every_argument_that_we_pass(
    profile: str, engine_names: set[str], speculation_names: set[str]
) -> None:
    kwargs = kwargs_of(profile)["engine_kwargs"]
    check_engine_arguments(kwargs, engine_names)
    check_speculation_options(kwargs["speculative_config"], speculation_names)


def test_what_we_refuse_exists(engine_names: set[str], speculation_names: set[str]) -> None:
    assert {name.partition(".")[0] for name in OWNED_ENGINE_ARGUMENTS} <= engine_names
    assert set(OWNED_SPECULATION_OPTIONS) <= speculation_names


def test_a_misspelt_engine_argument_gets_the_real_one(engine_names: set[str]) -> None:
    with pytest.raises(SettingsError, match=r"engine\.max_model_length: .*did you mean max_model_len\?"):
        check_engine_arguments({"max_model_length": 1}, engine_names)


@pytest.mark.parametrize("profile", profile_names())
def test_ray_takes_the_configuration(profile: str) -> None:
    from ray.serve.llm import LLMConfig

    config: Any = LLMConfig(**kwargs_of(profile))
    engine: Any = config.get_engine_config()
    kind = "cpu" if profile == "smollm2-cpu" else "gpu"
    assert config.accelerator_config.kind == kind
    (bundle,) = engine.placement_bundles
    assert bundle.get("GPU", 0) == (1 if kind == "gpu" else 0)
    # vLLM's HTTP options reach the app that it builds
    assert engine.frontend_kwargs["disable_fastapi_docs"] is True
    assert engine.frontend_kwargs["trust_request_chat_template"] is False
    arguments = engine.get_initialization_kwargs()
    assert arguments["distributed_executor_backend"] == ("mp" if kind == "cpu" else "ray")


def test_ray_knows_our_accelerators() -> None:
    from ray.serve.llm import LLMConfig

    for accelerator in GPU_MEMORY_GB:
        kwargs = kwargs_of("gemma4-31b-h200", hardware={"accelerator": accelerator})
        assert LLMConfig(**kwargs).accelerator_type == accelerator
    two: Any = LLMConfig(**kwargs_of("gemma4-31b-h200", hardware={"accelerator": "gpu", "gpus_per_replica": 2}))
    assert two.accelerator_config.kind == "gpu"
    assert [bundle["GPU"] for bundle in two.get_engine_config().placement_bundles] == [1, 1]


def test_a_replica_of_one_gpu_holds_it() -> None:
    from ray.serve.llm import LLMConfig

    from deployments.server import DFlashServer

    def of(profile: str, **args: Any) -> tuple[float, list[dict[str, float]]]:
        options = DFlashServer.get_deployment_options(LLMConfig(**kwargs_of(profile, **args)))
        return options["ray_actor_options"].get("num_gpus", 0), options["placement_group_bundles"]

    gpus, (bundle,) = of("gemma4-31b-h200")
    assert (gpus, bundle["GPU"]) == (1, 1)
    # vLLM's Ray workers hold those of a replica that has several
    gpus, bundles = of("gemma4-31b-h200", hardware={"accelerator": "gpu", "gpus_per_replica": 2})
    assert (gpus, [bundle["GPU"] for bundle in bundles]) == (0, [1, 1])
    gpus, (bundle,) = of("smollm2-cpu")
    assert (gpus, bundle["GPU"]) == (0, 0)


@pytest.fixture
def own_environment() -> Iterator[None]:
    """vLLM's CPU platform sets variables (LD_PRELOAD among them) that servers of later tests would inherit."""
    with patch.dict(os.environ, {"VLLM_CPU_KVCACHE_SPACE": "1"}):
        yield


@pytest.mark.usefixtures("own_environment")
def test_the_engine_of_one_gpu_is_configured_in_the_replica(tmp_path: Path) -> None:
    from ray.serve.llm import LLMConfig
    from vllm.engine.arg_utils import EngineArgs

    from benchmarks.gemma4_shapes import write_pair
    from deployments._upstream import engine_on_own_gpu

    target, _ = write_pair(tmp_path, tiny=True)
    engine = {"max_model_len": 256, "dtype": "float32"}
    speculation = {"mode": "off"}
    kwargs = kwargs_of("gemma4-31b-h200", target=str(target), engine=engine, speculation=speculation)
    ours: Any = engine_on_own_gpu()(LLMConfig(**kwargs))
    arguments, front_end, config = ours._prepare_engine_config(None)
    assert arguments.distributed_executor_backend == "uni"
    assert config.model_config.model == str(target)
    # what `vllm serve` would have; vLLM's CPU platform has a worker process always
    plain = EngineArgs(model=str(target), dtype="float32", max_model_len=256).create_engine_config()
    backend = config.parallel_config.distributed_executor_backend
    assert backend == plain.parallel_config.distributed_executor_backend
    assert front_end.disable_fastapi_docs is True


def test_vllm_reads_the_environment_that_we_set(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import envs

    kwargs = kwargs_of("smollm2-cpu", hardware={"kv_cache_gib": 3}, limits={"max_n": 5})
    for name, value in kwargs["runtime_env"]["env_vars"].items():
        monkeypatch.setenv(name, value)
    assert envs.VLLM_CPU_KVCACHE_SPACE == 3
    assert envs.VLLM_MAX_N_SEQUENCES == 5
    assert envs.VLLM_CPU_OMP_THREADS_BIND == "nobind"
    assert envs.VLLM_NO_USAGE_STATS is True
    assert envs.VLLM_SERVER_DEV_MODE is False
    assert envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING is False
    assert envs.VLLM_MEDIA_URL_ALLOW_REDIRECTS is False


def test_parsers_and_backends_of_the_profiles_exist() -> None:
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    engine = kwargs_of("gemma4-31b-b300")["engine_kwargs"]
    assert inspect.isclass(ReasoningParserManager.get_reasoning_parser(engine["reasoning_parser"]))
    assert inspect.isclass(ToolParserManager.get_tool_parser(engine["tool_call_parser"]))
    assert AttentionBackendEnum[engine["attention_backend"]]
    assert AttentionBackendEnum[engine["speculative_config"]["attention_backend"]]


def test_media_come_from_no_domain() -> None:
    from vllm.multimodal.media import MediaConnector

    domains = kwargs_of("gemma4-31b-b300")["engine_kwargs"]["allowed_media_domains"]
    with pytest.raises(ValueError, match="allowed domains"):
        MediaConnector(allowed_media_domains=domains).fetch_image("https://example.com/cat.png")


def test_serve_takes_the_committed_configuration() -> None:
    from ray.serve.schema import ServeDeploySchema

    text = (ROOT / "serve_config.yaml").read_text()
    config = ServeDeploySchema.model_validate(yaml.safe_load(text))
    (application,) = config.applications
    assert (application.import_path, application.route_prefix) == ("deployments.app:build", "/")
    assert (config.http_options.host, config.http_options.port) == ("127.0.0.1", 8000)
    assert application.args == {"profile": "auto"}
    # Serve ignores names that it does not know
    assert set(yaml.safe_load(text)) <= set(ServeDeploySchema.model_fields)
