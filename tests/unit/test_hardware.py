"""What `profile: auto` picks."""

from __future__ import annotations

import pytest

from dflash_serve.hardware import (
    ANY_GPU,
    CPU_PROFILE,
    GPU_MEMORY_GB,
    PROFILE_OF_GPU,
    Cluster,
    accelerator_named,
    choose_profile,
)
from dflash_serve.settings import profile_names


@pytest.mark.parametrize(
    ("gpus", "profile", "reason"),
    [
        ({}, "smollm2-cpu", "no GPU now (2 CPUs); where GPU nodes join later, name the profile"),
        ({"B300": 0}, "smollm2-cpu", "no GPU now"),
        ({"B300": 8}, "gemma4-31b-b300", "8 x B300"),
        ({"B200": 1}, "gemma4-31b-b200", "1 x B200"),
        ({"H200": 4}, "gemma4-31b-h200", "4 x H200"),
        ({"H200": 16, "B300": 1}, "gemma4-31b-b300", "1 x B300"),
        ({"H100": 8, "H200": 1}, "gemma4-31b-h200", "1 x H200"),
    ],
)
def test_a_bundled_profile(gpus: dict[str, int], profile: str, reason: str) -> None:
    choice = choose_profile(Cluster(cpus=2, gpus=gpus))
    assert choice.profile == profile
    assert reason in choice.reason


@pytest.mark.parametrize(
    ("gpus", "accelerator", "reason"),
    [
        (
            {"H100": 8},
            "H100",
            "8 x H100 and no profile for it (H100 has 80 GB; there are profiles for B300, B200, H200 and cpu)",
        ),
        ({"L4": 1, "A100": 2}, "A100", "1 x L4, 2 x A100 and no profile for it (L4 has 24 GB; there"),
        ({"GeForce-RTX-5090": 1}, ANY_GPU, "1 x GeForce-RTX-5090 and no profile for it (there"),
        ({"": 2}, ANY_GPU, "2 x GPU of unknown type and no profile for it (there"),
    ],
)
def test_gpus_without_a_profile(gpus: dict[str, int], accelerator: str, reason: str) -> None:
    choice = choose_profile(Cluster(cpus=8, gpus=gpus))
    assert choice.profile is None
    assert choice.accelerator == accelerator
    assert reason in choice.reason


@pytest.mark.parametrize(
    ("accelerator", "profile"), [("B300", "gemma4-31b-b300"), ("cpu", "smollm2-cpu"), ("H100", None)]
)
def test_a_named_accelerator_goes_before_what_the_cluster_has(accelerator: str, profile: str | None) -> None:
    choice = choose_profile(Cluster(cpus=2, gpus={"H200": 1}), accelerator)
    assert choice.profile == profile
    assert choice.accelerator == accelerator
    assert choice.reason.startswith(f"hardware.accelerator is {accelerator}")


def test_every_choice_is_a_bundled_profile() -> None:
    assert {CPU_PROFILE, *PROFILE_OF_GPU.values()} == set(profile_names())
    assert set(PROFILE_OF_GPU) <= set(GPU_MEMORY_GB)


def test_any_gpu_leaves_the_choice_to_what_there_is() -> None:
    assert choose_profile(Cluster(cpus=2, gpus={"H200": 1}), ANY_GPU).profile == "gemma4-31b-h200"


def test_accelerators_are_known_in_any_letter_case() -> None:
    assert (accelerator_named("b300"), accelerator_named("CPU"), accelerator_named("B30")) == ("B300", "cpu", None)
