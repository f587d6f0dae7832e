"""Which bundled profile fits a cluster. Pure: `deployments/` says what the cluster offers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

CPU = "cpu"
ANY_GPU = "gpu"
"""A GPU of whatever kind: for cards that Ray cannot name, or a cluster with one kind only."""
NAMED_GPU = "accelerator_type:"
"""How Ray's name of a node resource begins that tells the kind of its GPUs."""

GPU_MEMORY_GB: dict[str, int | None] = {
    "A10G": 24,
    "A100": None,
    "A100-40G": 40,
    "A100-80G": 80,
    "B200": 180,
    "B300": 288,
    "GB200": 186,
    "GB300": 288,
    "H20": 96,
    "H100": 80,
    "H200": 150,
    "L4": 24,
    "L40S": 48,
    "RTX-PRO-6000": 96,
}
"""GPUs that can run bfloat16 attention kernels, by Ray's name (ray/util/accelerators/accelerators.py), and their
memory in GB of 10^9 bytes: an H200's as it was measured (139.8 GiB), the others' as their makers name them; None where
one name covers several sizes."""

ACCELERATORS = (CPU, ANY_GPU, *GPU_MEMORY_GB)

CPU_PROFILE = "smollm2-cpu"
PROFILE_OF_GPU = {"B300": "gemma4-31b-b300", "B200": "gemma4-31b-b200", "H200": "gemma4-31b-h200"}
"""Ray's accelerator type -> profile, in the order in which `auto` looks."""


@dataclass(frozen=True)
class Cluster:
    """What the Ray cluster offers now."""

    cpus: float
    gpus: Mapping[str, int]
    """Accelerator type -> GPUs of it; the type is "" for GPUs that Ray cannot name."""


def this_machine() -> Cluster:
    """Without its GPUs, whose kind is known to Ray alone."""
    return Cluster(cpus=os.cpu_count() or 1, gpus={})


@dataclass(frozen=True)
class Choice:
    """What `profile: auto` comes to."""

    profile: str | None
    """The bundled profile; None when none fits the GPUs."""
    accelerator: str
    """Value for `hardware.accelerator`."""
    reason: str
    """Why, in words for the log or for the error."""


def accelerator_named(text: str) -> str | None:
    """The accelerator in our spelling, whatever the letters' case; None for one that we do not know."""
    return {name.casefold(): name for name in ACCELERATORS}.get(text.casefold())


def choose_profile(cluster: Cluster, accelerator: str | None = None) -> Choice:
    """The bundled profile for the accelerator that the user named, else for what the cluster offers now."""
    if accelerator is not None and accelerator != ANY_GPU:
        profile = CPU_PROFILE if accelerator == CPU else PROFILE_OF_GPU.get(accelerator)
        named = f"hardware.accelerator is {accelerator}"
        return Choice(profile, accelerator, named if profile else f"{named} and {_without_profile([accelerator])}")
    gpus = {kind: count for kind, count in cluster.gpus.items() if count > 0}
    if not gpus:
        return Choice(
            CPU_PROFILE,
            CPU,
            f"the cluster has no GPU now ({cluster.cpus:g} CPUs); where GPU nodes join later, name the profile",
        )
    for kind, profile in PROFILE_OF_GPU.items():
        if kind in gpus:
            return Choice(profile, kind, f"the cluster has {gpus[kind]} x {kind}")
    most = max(gpus, key=lambda kind: gpus[kind])
    found = ", ".join(f"{count} x {kind or 'GPU of unknown type'}" for kind, count in gpus.items())
    return Choice(None, most if most in GPU_MEMORY_GB else ANY_GPU, f"{found} and {_without_profile(gpus)}")


def _without_profile(kinds: Iterable[str]) -> str:
    sizes = [f"{kind} has {memory_gb} GB; " for kind in kinds if (memory_gb := GPU_MEMORY_GB.get(kind))]
    return f"no profile for it ({''.join(sizes)}there are profiles for {', '.join(PROFILE_OF_GPU)} and {CPU})"


def has_gpu() -> bool:
    """Whether this process sees a GPU; which one `profile: auto` takes is known to Ray alone. Imports torch."""
    import torch

    return torch.cuda.is_available()


def need_profile(args: Mapping[str, object], mend: str) -> None:
    """Raises ValueError where `args` leave the profile to Ray, and this machine has a GPU.

    Args:
        args: What stands under `args` in serve_config.yaml.
        mend: What the error begins with: the option, and what to do with it.
    """
    if args.get("profile", "auto") == "auto" and has_gpu():
        raise ValueError(f"{mend}; which one `auto` would take on this machine is known to Ray alone")
