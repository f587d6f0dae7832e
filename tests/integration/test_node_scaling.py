"""Ray's autoscaler adds a pod for a replica that waits: what a replica asks for against what the overlay says of its
workers, by Ray's own code. No node runs (imports vllm: seconds)."""

from __future__ import annotations

import copy
import json
from typing import Any, NamedTuple

import pytest
from ray._private.utils import parse_resources_json
from ray.autoscaler._private.cli_logger import cf, cli_logger
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingReply, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated import autoscaler_pb2

from benchmarks.pod_failures import ray_start
from dflash_serve.kubernetes import serve
from dflash_serve.settings import llm_config_kwargs
from tests.unit.kubernetes.rendered import OVERLAYS, Resource, one, overlay, serve_config, workers

pytestmark = pytest.mark.integration
GPU_OVERLAYS = [name for name in OVERLAYS if name != "cpu-demo"]


class Demand(NamedTuple):
    """What Serve asks Ray for to place one replica."""

    bundles: list[dict[str, float]]
    strategy: str


def demand_of(service: Resource) -> Demand:
    from ray.serve.llm import LLMConfig, build_llm_deployment

    from deployments.server import DFlashServer

    settings = serve.settings_of(serve_config(service)["applications"][0]["args"])
    config = LLMConfig(**llm_config_kwargs(settings))
    application: Any = build_llm_deployment(config, deployment_cls=DFlashServer)
    replica = application._bound_deployment._replica_config
    own = replica.ray_actor_options.get("num_gpus") or 0
    assert own <= replica.placement_group_bundles[0].get("GPU", 0), "the replica's own GPU is in its first bundle"
    return Demand(replica.placement_group_bundles, replica.placement_group_strategy)


def cluster_of(service: Resource) -> Resource:
    """The RayCluster that the operator makes of the RayService."""
    return {
        "metadata": {"name": service["metadata"]["name"], "namespace": "dflash"},
        "spec": copy.deepcopy(service["spec"]["rayClusterConfig"]),
    }


def asked(cluster: Resource, demand: Demand, *, replicas: int) -> SchedulingReply:
    """What the autoscaler does about `replicas` that wait."""
    config = AutoscalingConfig(_derive_autoscaling_config_from_ray_cr(cluster))
    gang: Any = autoscaler_pb2.GangResourceRequest  # type: ignore[attr-defined]
    gangs = [gang(requests=[ResourceRequestUtil.make(bundle) for bundle in demand.bundles]) for _ in range(replicas)]
    return ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            gang_resource_requests=gangs,
        )
    )


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_pod_is_added_for_each_replica_that_waits(name: str) -> None:
    service = one(overlay(name), "RayService")
    cluster, demand, group = cluster_of(service), demand_of(service), workers(service)
    settings = serve.settings_of(serve_config(service)["applications"][0]["args"])
    most = settings.autoscaling.max_replicas
    reply = asked(cluster, demand, replicas=most)
    assert reply.infeasible_gang_resource_requests == []
    started = {launch.instance_type: launch.count for launch in reply.to_launch}
    assert started == {group["groupName"]: most}, "one replica a pod"


@pytest.mark.parametrize("name", GPU_OVERLAYS)
def test_without_the_kind_of_gpu_no_pod_would_be_added_above_the_least(name: str) -> None:
    service = one(overlay(name), "RayService")
    cluster, demand = cluster_of(service), demand_of(service)
    assert demand.strategy == "STRICT_PACK"
    (group,) = cluster["spec"]["workerGroupSpecs"]
    del group["rayStartParams"]["resources"]
    reply = asked(cluster, demand, replicas=group["maxReplicas"])
    assert len(reply.infeasible_gang_resource_requests) == group["maxReplicas"]
    (launch,) = (launch for launch in reply.to_launch if launch.instance_type == group["groupName"])
    assert launch.count == group["minReplicas"]


@pytest.mark.parametrize("name", GPU_OVERLAYS)
def test_operator_shell_and_autoscaler_read_the_same_resources(name: str) -> None:
    group = workers(one(overlay(name), "RayService"))
    kind = group["labels"]["ray.io/accelerator-type"]
    wanted = {f"accelerator_type:{kind}": 1}
    text = group["rayStartParams"]["resources"]
    # getResourcesMap of KubeRay's pod.go
    assert json.loads(text.strip("'\"` ")) == wanted
    (option,) = (word for word in ray_start(group, head=False) if word.startswith("--resources="))
    assert parse_resources_json(option.removeprefix("--resources="), cli_logger, cf) == wanted
    node_types = _derive_autoscaling_config_from_ray_cr(cluster_of(one(overlay(name), "RayService")))
    assert node_types["available_node_types"][group["groupName"]]["resources"].items() >= wanted.items()
