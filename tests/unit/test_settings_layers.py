"""Defaults, profile and `args`: which value wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dflash_serve import demo
from dflash_serve.settings import Cluster, Resolved, SettingsError, profile_names, resolve

CPU_ONLY = Cluster(cpus=2, gpus={})


def resolved(args: dict[str, Any], cluster: Cluster = CPU_ONLY) -> Resolved:
    return resolve(args, cluster, read_config=lambda _: None)


@pytest.mark.parametrize("name", profile_names())
def test_each_profile_can_scale_and_fill_its_engine(name: str) -> None:
    settings = resolved({"profile": name}).settings
    assert settings.autoscaling.target_ongoing_requests < settings.limits.max_concurrent_requests
    assert settings.engine["max_num_seqs"] <= settings.limits.max_concurrent_requests


def test_auto_says_why() -> None:
    result = resolved({}, Cluster(cpus=64, gpus={"B300": 8}))
    assert (result.profile, result.reason) == ("gemma4-31b-b300", "the cluster has 8 x B300")


def test_auto_follows_a_named_accelerator() -> None:
    result = resolved({"hardware": {"accelerator": "b200"}})
    assert (result.profile, result.settings.hardware.accelerator) == ("gemma4-31b-b200", "B200")


def test_auto_without_a_fitting_profile_takes_the_gpus_and_a_pair_of_ones_own() -> None:
    cluster = Cluster(cpus=8, gpus={"H100": 2})
    with pytest.raises(SettingsError, match="name one, or set target and drafter to a pair that fits"):
        resolved({}, cluster)
    own = resolved({"target": "org/model", "drafter": "org/model-DFlash"}, cluster)
    assert own.settings.hardware.accelerator == "H100"
    assert own.settings.engine["trust_remote_code"] is False
    assert "limit_mm_per_prompt" not in own.settings.engine


# One override of every setting, of those too that the profile sets.
OVERRIDES: dict[str, Any] = {
    "model_id": "mine",
    "target_revision": "abc",
    "drafter_revision": "def",
    "speculation": {"mode": "off", "max_draft_tokens": 3, "attention_backend": "FLEX_ATTENTION", "options": {"a": 1}},
    "hardware": {"cpus_per_replica": 1.5, "kv_cache_gib": 4, "omp_threads": 3},
    "autoscaling": {"min_replicas": 2, "max_replicas": 5, "initial_replicas": 3, "target_ongoing_requests": 2.5},
    "routing": {"policy": "prefix_aware"},
    "limits": {"max_concurrent_requests": 9, "max_output_tokens": None, "max_stream_seconds": 12.5},
    "auth": {"keys_env": "API_KEYS", "keys_file": "/run/keys", "anonymous": "anywhere"},
    "metrics": {"acceptance_window_seconds": 5},
}


@pytest.mark.parametrize("section", OVERRIDES)
def test_args_go_over_the_profile_and_leave_the_rest(section: str) -> None:
    base = resolved({}).settings.model_dump()
    wanted = OVERRIDES[section]
    got = resolved({section: wanted}).settings.model_dump()
    assert got.pop(section) == (base.pop(section) | wanted if isinstance(wanted, dict) else wanted)
    base.pop(section, None)
    assert got == base


def test_engine_arguments_merge_deeply_and_null_takes_one_out() -> None:
    engine = {"limit_mm_per_prompt": {"image": 2}, "max_num_seqs": 8, "reasoning_parser": None, "seed": 1}
    base = resolved({"profile": "gemma4-31b-h200"}).settings.engine
    got = resolved({"profile": "gemma4-31b-h200", "engine": engine}).settings.engine
    assert got["limit_mm_per_prompt"] == {"image": 2, "audio": 0, "video": 0}
    assert (got["max_num_seqs"], got["seed"]) == (8, 1)
    assert "reasoning_parser" in base
    assert "reasoning_parser" not in got


def test_a_section_with_all_lines_commented_out() -> None:
    args = yaml.safe_load("auth:\n  # keys_env: API_KEYS\nlimits:\nengine:\n")
    assert resolved(args).settings == resolved({}).settings


def test_a_bare_off_in_yaml() -> None:
    args = yaml.safe_load("speculation: {mode: off}")
    assert args == {"speculation": {"mode": False}}
    assert not resolved(args).settings.speculates


def test_another_target_takes_nothing_of_the_profiles_target(tmp_path: Path) -> None:
    profile = tmp_path / "pinned.yaml"
    profile.write_text("target: org/a\ntarget_revision: r1\ndrafter: org/a-DFlash\ndrafter_revision: r2\nmodel_id: a\n")
    args = {"profile": str(profile), "target": "org/b"}
    with pytest.raises(SettingsError, match=r"^drafter: missing; name the target's DFlash drafter"):
        resolved(args)
    settings = resolved({**args, "drafter": "org/b-DFlash"}).settings
    assert (settings.served_name, settings.target_revision, settings.drafter_revision) == ("org/b", None, None)
    only_drafter = resolved({"profile": str(profile), "drafter": "org/a-DFlash2"}).settings
    assert (only_drafter.served_name, only_drafter.target_revision, only_drafter.drafter_revision) == ("a", "r1", None)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (demo.TARGET, "smollm2-135m-instruct"),
        ("org/model", "org/model"),
        ("/models/my-model/", "my-model"),
        ("s3://bucket/models/my-model", "my-model"),
    ],
)
def test_the_name_that_clients_use(target: str, name: str) -> None:
    assert resolved({"target": target, "speculation": {"mode": "off"}}).settings.served_name == name


def test_the_drafters_block_bounds_the_draft_tokens(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"block_size": 8}))
    args: dict[str, Any] = {"drafter": str(tmp_path), "speculation": {"max_draft_tokens": 7}}
    assert resolve(args, CPU_ONLY).settings.drafter == str(tmp_path)
    args["speculation"]["max_draft_tokens"] = 8
    with pytest.raises(SettingsError, match=r"^speculation\.max_draft_tokens: 8 is more .*; set 7 or less$"):
        resolve(args, CPU_ONLY)
    args["speculation"]["mode"] = "off"
    assert not resolve(args, CPU_ONLY).settings.speculates


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no readable config.json"),
        ("{", "no readable config.json"),
        ("[]", "no readable"),
        ("{}", "no block_size"),
    ],
)
def test_a_drafter_folder_that_is_no_checkpoint(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(SettingsError, match=f"^drafter: .*{message}"):
        resolve({"drafter": str(tmp_path)}, CPU_ONLY)


def test_a_drafter_that_is_not_here_is_checked_later() -> None:
    for drafter in ("org/model-DFlash", "/only/on/the/gpu/node"):
        assert resolve({"drafter": drafter, "speculation": {"max_draft_tokens": 99}}, CPU_ONLY).settings.speculates
