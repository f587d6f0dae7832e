"""serve_config.yaml and an overlay's settings -> what the overlay lays over the base. Pure."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dflash_serve.hardware import ANY_GPU, NAMED_GPU, Cluster
from dflash_serve.models import DEFAULT_REVISION, Model
from dflash_serve.preflight.checks import is_pinned
from dflash_serve.settings import Settings, SettingsError, resolve
from dflash_serve.settings.profiles import merge

MODELS_FOLDER = Path("/models")
"""Where the models' volume is mounted."""
KEYS_FILE = "/etc/dflash/api-keys/keys"
START_SECONDS = 600
"""What a replica that takes over from a draining one may take: a pod, an image, the weights, the engine's start. On one
H200 load, compilation and CUDA graphs of this size took 100 to 170 s."""
MARGIN_SECONDS = 60
"""For what comes after the longest stream: HAProxy's own drain (30 s) and the processes' end."""

Operation = dict[str, Any]
"""One operation of a JSON patch (RFC 6902)."""


def serve_config(base: Mapping[str, Any], args: Mapping[str, Any]) -> dict[str, Any]:
    """The `serveConfigV2` of a cluster: the repository's configuration, opened to the pod's network, with the overlay's
    `args` and the models where the volume has them.

    Args:
        base: serve_config.yaml.
        args: The overlay's own settings.

    Raises SettingsError when the two together are wrong.
    """
    config = copy.deepcopy(dict(base))
    config["http_options"]["host"] = "0.0.0.0"
    config["logging_config"]["encoding"] = "JSON"
    (application,) = config["applications"]
    application["args"] = in_cluster(merge(application["args"], args))
    resolve(application["args"], _NO_GPU)
    return config


def in_cluster(args: Mapping[str, Any]) -> dict[str, Any]:
    """`args` with hub names replaced by folders of the models' volume, and keys from their Secret's file."""
    settings = settings_of(args)
    own: dict[str, Any] = {"auth": {"keys_file": KEYS_FILE}}
    for role, model in _models(settings).items():
        if model.on_hub:
            own |= {"model_id": settings.served_name, role: str(model.folder(MODELS_FOLDER))}
    return {name: value for name, value in merge(args, own).items() if not name.endswith("_revision")}


def models(args: Mapping[str, Any]) -> list[Model]:
    """What the volume must hold: the target, and the drafter where one is used."""
    return [model for model in _models(settings_of(args)).values() if model.on_hub or model.bundled]


def unpinned(args: Mapping[str, Any]) -> list[str]:
    """A line for each model of the volume that is not named by a commit: in the cluster it is a folder, and preflight
    can no longer tell."""
    return [
        f"{role}_revision: {model.revision} is no commit, so what the volume gets depends on the day; pin it (40 hex "
        "digits, on the model's page under Files, History)"
        for role, model in _models(settings_of(args)).items()
        if model.on_hub and not is_pinned(model.revision)
    ]


def overlay_patch(base: Mapping[str, Any], args: Mapping[str, Any], dump: Any) -> list[Operation]:
    """What an overlay changes in the RayService.

    Args:
        base: serve_config.yaml.
        args: The overlay's settings.
        dump: Gives the text of a YAML value.
    """
    settings = settings_of(merge(base["applications"][0]["args"], args))
    scaling, stream_seconds = settings.autoscaling, round(settings.limits.max_stream_seconds)
    drain_seconds = START_SECONDS + stream_seconds + MARGIN_SECONDS
    cluster = "/spec/rayClusterConfig"
    group = f"{cluster}/workerGroupSpecs/0"
    head_pod, worker_pod = f"{cluster}/headGroupSpec/template/spec", f"{group}/template/spec"
    # a changed configuration makes HAProxy start anew; its old process carries its streams on for so long, then cuts
    haproxy = {"name": "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S", "value": str(stream_seconds + MARGIN_SECONDS)}
    return [
        add("/spec/serveConfigV2", dump(serve_config(base, args))),
        # streams of the old cluster end before it does
        add("/spec/rayClusterDeletionDelaySeconds", stream_seconds + MARGIN_SECONDS),
        add(f"{group}/replicas", scaling.replicas_at_start),
        add(f"{group}/minReplicas", scaling.min_replicas),
        # one pod more than replicas: where a drained node's replica moves to, and a rolling update's extra one
        add(f"{group}/maxReplicas", scaling.max_replicas + 1),
        *(add(f"{group}/rayStartParams/{name}", value) for name, value in ray_start_parameters(settings).items()),
        add(f"{worker_pod}/terminationGracePeriodSeconds", drain_seconds + MARGIN_SECONDS),
        add(f"{worker_pod}/containers/0/lifecycle/preStop/exec/command", drain_command(drain_seconds)),
        add(f"{head_pod}/containers/0/env/-", haproxy),
        add(f"{worker_pod}/containers/0/env/-", haproxy),
        *(add(f"{pod}/initContainers/0/command", models_command("wait", args)) for pod in (head_pod, worker_pod)),
    ]


def ray_start_parameters(settings: Settings) -> dict[str, str]:
    """What Ray counts on a worker: what one replica takes, so that a pod never gets two.

    Raises SettingsError when Ray cannot count it.
    """
    hardware = settings.hardware
    if not float(hardware.cpus_per_replica).is_integer():
        raise SettingsError(
            [
                f"hardware.cpus_per_replica: {hardware.cpus_per_replica:g} is not a whole number, and Ray counts whole "
                "CPUs of a pod, all of which its replica takes: set 1 or more"
            ]
        )
    parameters = {"num-cpus": str(int(hardware.cpus_per_replica))}
    if not hardware.is_cpu and hardware.accelerator != ANY_GPU:
        # Ray asks for a part of this with each GPU. A node that runs finds it by itself; the autoscaler reads here what
        # one that does not run yet would have, and adds none where it is missing. Single quotes: the operator strips
        # them and parses, the autoscaler cuts off one character at either end, and the pod's shell drops them.
        resources = {NAMED_GPU + hardware.accelerator: 1}
        parameters["resources"] = f"'{json.dumps(resources)}'"
    return parameters


def job_patch(args: Mapping[str, Any]) -> list[Operation]:
    """What an overlay changes in the Job that fills the models' volume."""
    return [add("/spec/template/spec/containers/0/command", models_command("fetch", args))]


def models_command(what: str, args: Mapping[str, Any]) -> list[str]:
    """Fetch the models, or wait for them."""
    return ["python", "-m", "dflash_serve.models", what, str(MODELS_FOLDER), *map(str, models(args))]


def drain_command(seconds: int) -> list[str]:
    """What a worker does before it stops."""
    return ["python", "-m", "deployments.drain", "--deadline-seconds", str(seconds)]


def add(path: str, value: Any) -> Operation:
    return {"op": "add", "path": path, "value": value}


def settings_of(args: Mapping[str, Any]) -> Settings:
    """What `args` come to. Raises SettingsError."""
    return resolve(args, _NO_GPU).settings


def _models(settings: Settings) -> dict[str, Model]:
    """By the setting that names it."""
    found = {"target": Model(settings.target, settings.target_revision or DEFAULT_REVISION)}
    if settings.speculates and settings.drafter is not None:
        found["drafter"] = Model(settings.drafter, settings.drafter_revision or DEFAULT_REVISION)
    return found


_NO_GPU = Cluster(cpus=0, gpus={})
"""An overlay names its profile; there is nothing to look at."""
