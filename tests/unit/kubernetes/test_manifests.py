"""What is sent to a cluster is valid, and keeps the operator's rules, which its definitions do not express."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from dflash_serve.kubernetes import serve
from dflash_serve.settings import Settings
from tests.unit.kubernetes import crd_schema
from tests.unit.kubernetes.rendered import (
    OVERLAYS,
    ROOT,
    Resource,
    container,
    environment,
    head,
    one,
    overlay,
    pod,
    render,
    render_path,
    serve_config,
    workers,
)

KUBERNETES = "1.37"
GPU_OVERLAYS = ("b300", "h200")
CLOSED_PORTS = {"HAProxy's statistics": 8404, "HAProxy's metrics": 9101, "a replica": 30000, "the dashboard": 8265}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@cache
def definitions() -> dict[crd_schema.Kind, jsonschema.Draft7Validator]:
    return crd_schema.load_definitions(ROOT / "tests" / "data" / "crds")


def settings_of(name: str) -> Settings:
    args = serve_config(one(overlay(name), "RayService"))["applications"][0]["args"]
    return serve.settings_of(args)


def service_of(name: str) -> Resource:
    return one(overlay(name), "RayService")


def validate(resource: Resource) -> None:
    if (resource["apiVersion"], resource["kind"]) in definitions():
        assert crd_schema.problems(resource, definitions()) == []
        for group in [head(resource), workers(resource)] if resource["kind"] == "RayService" else []:
            # the definition's copy of a pod knows less than Kubernetes does
            template = group["template"] | {"metadata": group["template"]["metadata"] | {"name": "pod"}}
            validate({"apiVersion": "v1", "kind": "Pod"} | template)
    else:
        kubernetes_validate.validate(resource, KUBERNETES, strict=True)


@pytest.mark.parametrize("folder", [f"overlays/{name}" for name in OVERLAYS] + ["monitoring"])
def test_every_resource_is_valid(folder: str) -> None:
    resources = render(folder)
    for resource in resources:
        validate(resource)
    names = [(r["kind"], r["metadata"].get("namespace"), r["metadata"]["name"]) for r in resources]
    assert len(set(names)) == len(names)


def test_the_validators_do_find_mistakes() -> None:
    broken = yaml.safe_load(yaml.safe_dump(service_of("b300")))
    broken["spec"]["serveConfigv2"] = ""
    workers(broken)["minReplica"] = 1
    pod(workers(broken))["containers"][0]["resources"]["requests"]["cpu"] = [1]
    words = " ".join(crd_schema.problems(broken, definitions()))
    for name in ("serveConfigv2", "minReplica", "requests/cpu"):
        assert name in words
    policy = one(overlay("b300"), "NetworkPolicy", "dflash-clients")
    with pytest.raises(kubernetes_validate.ValidationError, match="ports_"):
        validate(policy | {"spec": policy["spec"] | {"ports_": []}})
    with pytest.raises(yaml.YAMLError, match="a stands twice"):
        yaml.load("{a: 1, a: 2}", crd_schema.StrictLoader)


@pytest.mark.parametrize("name", OVERLAYS)
def test_rules_of_the_operator(name: str) -> None:
    service = service_of(name)
    cluster = service["spec"]["rayClusterConfig"]
    group, labels = workers(service), one(overlay(name), "RayService")["metadata"].get("annotations", {})
    assert len(service["metadata"]["name"]) <= 47
    assert "ray.io/initializing-timeout" not in labels, "a RayService that runs into it has failed for good"
    assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["autoscalerOptions"]["version"] == "v2"
    for pods in (head(service), group):
        assert pod(pods).get("restartPolicy", "Never") == "Never", "the autoscaler's second version asks for it"
        assert all(isinstance(value, str) for value in pods["rayStartParams"].values())
        assert "labels" not in pods["rayStartParams"], "labels have a field of their own"
    assert cluster["authOptions"] == {"mode": "token", "secretName": "dflash-ray-token"}
    assert cluster["gcsFaultToleranceOptions"]["redisAddress"]
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 53, 0), "one health address a node since 2.53"
    assert service["spec"]["upgradeStrategy"]["type"] in ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")


def test_the_ray_version_is_the_one_that_is_locked() -> None:
    locked = dict(line.split("==") for line in (ROOT / "requirements" / "cpu.txt").read_text().split() if "==" in line)
    assert {service_of(name)["spec"]["rayClusterConfig"]["rayVersion"] for name in OVERLAYS} == {locked["ray"]}
    assert f"ray-llm:{locked['ray']}-" in (ROOT / "k8s" / "Dockerfile").read_text()


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_head_runs_no_replica_and_gets_no_request(name: str) -> None:
    service = service_of(name)
    assert head(service)["rayStartParams"]["num-cpus"] == "0"
    assert head(service)["rayStartParams"]["num-gpus"] == "0"
    assert service["spec"]["excludeHeadPodFromServeSvc"] is True
    assert "nvidia.com/gpu" not in str(container(head(service))["resources"])


@pytest.mark.parametrize("name", OVERLAYS)
def test_nodes_and_replicas_agree(name: str) -> None:
    settings, group = settings_of(name), workers(service_of(name))
    assert group["minReplicas"] == settings.autoscaling.min_replicas
    assert group["replicas"] == settings.autoscaling.replicas_at_start
    assert group["maxReplicas"] > settings.autoscaling.max_replicas, "a drained node's replica needs a place to go"
    cpus = float(group["rayStartParams"]["num-cpus"])
    assert cpus == settings.hardware.cpus_per_replica, "exactly one replica a pod"
    assert cpus <= float(container(group)["resources"]["requests"]["cpu"])
    budget = one(overlay(name), "PodDisruptionBudget")["spec"]
    assert isinstance(budget["minAvailable"], int), "a RayCluster has no scale to take a share of"
    assert 1 <= budget["minAvailable"] < settings.autoscaling.min_replicas, "a budget of all replicas blocks drains"


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_stopping_worker_lets_the_longest_stream_finish(name: str) -> None:
    service, stream_seconds = service_of(name), settings_of(name).limits.max_stream_seconds
    group = workers(service)
    drain_seconds = int(container(group)["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert drain_seconds > stream_seconds + serve.START_SECONDS
    assert pod(group)["terminationGracePeriodSeconds"] > drain_seconds
    assert service["spec"]["rayClusterDeletionDelaySeconds"] > stream_seconds
    for pods in (group, head(service)):
        assert int(environment(pods)["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) > stream_seconds


@pytest.mark.parametrize("name", OVERLAYS)
def test_head_and_workers_agree_on_the_way_in(name: str) -> None:
    from deployments.up import HIGH_THROUGHPUT, SESSION

    service = service_of(name)
    assert environment(head(service)) == environment(workers(service))
    assert environment(head(service)).items() >= HIGH_THROUGHPUT.items()
    buffered = "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE"
    assert environment(head(service))[buffered] == SESSION[buffered]
    (port,) = (p["containerPort"] for p in container(workers(service))["ports"] if p["name"] == "serve")
    assert port == serve_config(service)["http_options"]["port"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_loading_is_not_dying(name: str) -> None:
    worker, ray_head = container(workers(service_of(name))), container(head(service_of(name)))
    for probed in (worker, ray_head):
        for probe in ("startupProbe", "livenessProbe"):
            # of Ray's node, not of Serve: a replica that loads for minutes must not be killed for it
            assert probed[probe]["httpGet"] == {"path": "/api/healthz", "port": 52365}
        assert probed["livenessProbe"]["periodSeconds"] * probed["livenessProbe"]["failureThreshold"] >= 60
    assert worker["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": 8000}


@pytest.mark.parametrize("name", OVERLAYS)
def test_models_are_read_only_to_replicas_and_written_by_the_job(name: str) -> None:
    service, job = service_of(name), one(overlay(name), "Job")
    (filler,) = job["spec"]["template"]["spec"]["containers"]
    fetched = filler["command"]
    assert fetched[3] == "fetch"
    assert not any(mount.get("readOnly") for mount in filler["volumeMounts"])
    for pods in (head(service), workers(service)):
        for each in (*pod(pods)["containers"], *pod(pods)["initContainers"]):
            mounts = {mount["name"]: mount for mount in each["volumeMounts"]}
            assert mounts["models"]["readOnly"] is True
            assert mounts["models"]["mountPath"] == str(serve.MODELS_FOLDER)
        (waits,) = (each["command"] for each in pod(pods)["initContainers"])
        assert waits[3] == "wait"
        assert waits[4:] == fetched[4:], "what is waited for is what is fetched"
        keys = {m["name"]: m for m in container(pods)["volumeMounts"]}["api-keys"]
        assert Path(serve.KEYS_FILE).parent == Path(keys["mountPath"])
        assert "subPath" not in keys, "a changed Secret would not arrive"


def test_what_engines_compile_can_be_kept(tmp_path: Path) -> None:
    """An overlay of a user's own: ours, and the component."""
    k8s = Path(os.path.relpath(ROOT / "k8s", tmp_path.resolve()))
    (tmp_path / "kustomization.yaml").write_text(
        yaml.safe_dump(
            {"resources": [f"{k8s}/overlays/h200"], "components": [f"{k8s}/components/compile-cache"]}, sort_keys=False
        )
    )
    resources = render_path(tmp_path)
    for resource in resources:
        validate(resource)
    service = one(resources, "RayService")
    claim = one(resources, "PersistentVolumeClaim", "dflash-compile-cache")
    assert claim["metadata"]["namespace"] == service["metadata"]["namespace"]
    (volume,) = (v for v in pod(workers(service))["volumes"] if v["name"] == "compile-cache")
    assert volume["persistentVolumeClaim"] == {"claimName": "dflash-compile-cache"}, "written, so not read-only"
    (mount,) = (m for m in container(workers(service))["volumeMounts"] if m["name"] == "compile-cache")
    for name in ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR"):
        assert Path(mount["mountPath"]) in Path(environment(workers(service))[name]).parents
    assert "VLLM_CACHE_ROOT" not in environment(head(service))


@pytest.mark.parametrize("name", GPU_OVERLAYS)
def test_one_gpu_of_the_right_kind_a_replica(name: str) -> None:
    settings, group = settings_of(name), workers(service_of(name))
    limits, requests = (container(group)["resources"][key] for key in ("limits", "requests"))
    assert limits["nvidia.com/gpu"] == requests["nvidia.com/gpu"] == str(settings.hardware.gpus_per_replica)
    assert group["labels"] == {"ray.io/accelerator-type": settings.hardware.accelerator}
    assert group["rayStartParams"]["num-gpus"] == str(settings.hardware.gpus_per_replica)
    terms = pod(group)["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    ((match,),) = (term["matchExpressions"] for term in terms["nodeSelectorTerms"])
    assert match["key"] == "nvidia.com/gpu.product"
    assert all(settings.hardware.accelerator in product for product in match["values"])


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_pod_runs_with_as_little_as_it_needs(name: str) -> None:
    resources = overlay(name)
    service = one(resources, "RayService")
    pods = [pod(head(service)), pod(workers(service))]
    pods += [r["spec"]["template"]["spec"] for r in resources if r["kind"] in ("Job", "StatefulSet")]
    for spec in pods:
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for each in (*spec["containers"], *spec.get("initContainers", ())):
            assert each["securityContext"]["allowPrivilegeEscalation"] is False
            assert each["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in each["resources"]["requests"]
            assert "memory" in each["resources"]["limits"]
            assert ":" in each["image"].rsplit("/", 1)[-1], f"{each['image']} has no tag"
    for spec in pods[1:]:
        assert spec["automountServiceAccountToken"] is False
    for spec in (*pods[:2],):
        (shm,) = (volume for volume in spec["volumes"] if volume["name"] == "dshm")
        assert shm["emptyDir"]["medium"] == "Memory"
        assert {m["name"]: m["mountPath"] for m in spec["containers"][0]["volumeMounts"]}["dshm"] == "/dev/shm"
    assert not [r for r in resources if r["kind"] == "Secret"], "Secrets are made in the cluster, never committed"


def allowed_ports(resources: list[Resource], labels: dict[str, str], origin: dict[str, Any]) -> set[int | None]:
    """Ports of the pods with `labels` that any pod of a namespace labelled `origin` reaches; None: all."""
    found: set[int | None] = set()
    for policy in (r["spec"] for r in resources if r["kind"] == "NetworkPolicy"):
        if not selects(policy["podSelector"], labels):
            continue
        for rule in policy.get("ingress", ()):
            if any("podSelector" not in s and selects(s["namespaceSelector"], origin) for s in rule["from"]):
                found |= {port["port"] for port in rule.get("ports", ())} or {None}
    return found


def selects(selector: Resource, labels: dict[str, str]) -> bool:
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        labels.get(rule["key"]) in rule["values"] for rule in selector.get("matchExpressions", ())
    )


@pytest.mark.parametrize("name", OVERLAYS)
def test_only_the_serve_port_is_open_to_clients_and_the_metrics_to_prometheus(name: str) -> None:
    resources = overlay(name)
    worker = {"ray.io/originated-from-cr-name": "dflash", "ray.io/node-type": "worker"}
    ray_head = worker | {"ray.io/node-type": "head"}
    redis = {"app.kubernetes.io/name": "dflash-redis"}
    clients, prometheus = {"dflash.serve/client": "true"}, {"dflash.serve/monitoring": "true"}
    operator = {"kubernetes.io/metadata.name": "kuberay-system"}
    assert allowed_ports(resources, worker, clients) == {8000}
    assert allowed_ports(resources, ray_head, clients) == set()
    for pods in (worker, ray_head):
        assert allowed_ports(resources, pods, prometheus) == {8080, 44217, 44227}
        assert allowed_ports(resources, pods, {"kubernetes.io/metadata.name": "other"}) == set()
    assert allowed_ports(resources, ray_head, operator) == {8265}
    assert allowed_ports(resources, worker, operator) == set()
    for origin in (clients, prometheus, operator):
        assert allowed_ports(resources, redis, origin) == set()
        assert not allowed_ports(resources, worker, origin) & set(CLOSED_PORTS.values())
    denied = one(resources, "NetworkPolicy", "dflash-default-deny")["spec"]
    assert denied == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_prometheus_scrapes_ports_that_the_pods_have() -> None:
    monitor = one(render("monitoring"), "PodMonitor")
    wanted = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    names = {port["name"]: port["containerPort"] for port in container(head(service_of("b300")))["ports"]}
    assert wanted <= names.keys()
    policy = one(overlay("b300"), "NetworkPolicy", "dflash-prometheus")["spec"]["ingress"][0]["ports"]
    assert {names[name] for name in wanted} == {port["port"] for port in policy}


def test_the_gateway_passes_no_header_that_serve_obeys_and_no_larger_body_than_we_take() -> None:
    from ray.serve._private.constants import (
        SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER,
        SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER,
    )

    resources = render("ingress")
    (rule,) = one(resources, "HTTPRoute")["spec"]["rules"]
    (headers,) = rule["filters"]
    assert set(headers["requestHeaderModifier"]["remove"]) == {
        SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER,
        SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER,
    }
    # the operator names it after the RayService
    assert rule["backendRefs"] == [{"name": f"{service_of('b300')['metadata']['name']}-serve-svc", "port": 8000}]
    limit = one(resources, "BackendTrafficPolicy")["spec"]["requestBuffer"]["limit"]
    assert int(limit.removesuffix("Mi")) * 1024 * 1024 == settings_of("b300").limits.max_body_bytes
    (listener,) = one(resources, "Gateway")["spec"]["listeners"]
    assert listener["protocol"] == "HTTPS"
    assert listener["tls"]["mode"] == "Terminate"


def test_the_parts_of_the_way_in_refer_to_each_other() -> None:
    """Gateway API's own schemas are not among the definitions here; what hangs together is checked instead."""
    resources = render("ingress")
    gateway, route, policy = (one(resources, kind) for kind in ("Gateway", "HTTPRoute", "BackendTrafficPolicy"))
    assert len(resources) == 3
    (listener,), (parent,), (target,) = (
        gateway["spec"]["listeners"],
        route["spec"]["parentRefs"],
        policy["spec"]["targetRefs"],
    )
    assert parent == {"name": gateway["metadata"]["name"], "sectionName": listener["name"]}
    assert route["spec"]["hostnames"] == [listener["hostname"]]
    assert target == {
        "group": route["apiVersion"].partition("/")[0],
        "kind": route["kind"],
        "name": route["metadata"]["name"],
    }
    namespace = one(overlay("b300"), "RayService")["metadata"]["namespace"]
    assert {r["metadata"]["namespace"] for r in resources} == {namespace}, "a route reaches Services of its namespace"
    (port,) = (
        p["port"] for p in one(overlay("b300"), "NetworkPolicy", "dflash-clients")["spec"]["ingress"][0]["ports"]
    )
    assert [ref["port"] for rule in route["spec"]["rules"] for ref in rule["backendRefs"]] == [port]


def test_the_dockerfile_follows_the_rules() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    result = subprocess.run([hadolint, ROOT / "k8s" / "Dockerfile"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    _, _, *final = (ROOT / "k8s" / "Dockerfile").read_text().split("\nFROM ")
    assert len(final) == 2
    for stage in final:
        lines = stage.splitlines()
        assert [line for line in lines if line.startswith("USER")][-1] == "USER 1000:100"
        assert any(line.startswith("LABEL") for line in lines)
        assert not any(line.startswith("HEALTHCHECK") for line in lines), "Kubernetes probes"
