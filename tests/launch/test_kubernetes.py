"""Kubernetes manifests: what the cluster is asked for, and what every pod makes of its variables."""

import re
from dataclasses import replace
from typing import Any, Literal

import pytest

from neox.errors import LaunchError
from neox.launch.kubernetes import Pods, manifest, spelled
from neox.launch.node import Node, detect_node

PODS = Pods(
    name="pythia",
    nodes=3,
    gpus_per_node=8,
    tasks_per_node=8,
    image="registry/neox:1",
    command=["train.py", "configs/pythia/160M.yml"],
    folder="/workspace",
    volumes=["data:/data", "checkpoints:/checkpoints"],
    max_restarts=5,
    namespace="lab",
)


def test_jobset() -> None:
    found = manifest(PODS, "jobset")
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert found["metadata"] == {"name": "pythia", "namespace": "lab"}
    policy = found["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 5
    (rule,) = policy["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert manifest(replace(PODS, max_restarts=0), "jobset")["spec"]["failurePolicy"] == {"maxRestarts": 0}
    (replicated,) = found["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"], job["backoffLimit"]) == (3, 3, "Indexed", 0)
    evicted, ended_early = job["podFailurePolicy"]["rules"]
    assert evicted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert (ended_early["onExitCodes"]["operator"], ended_early["onExitCodes"]["values"]) == ("In", [75])
    assert ended_early["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    check_pod(job["template"]["spec"])
    variables = {entry["name"]: entry for entry in job["template"]["spec"]["containers"][0]["env"]}
    place = variables["PET_NODE_RANK"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert place == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    pod = {name: entry["value"] for name, entry in variables.items() if "value" in entry} | {"PET_NODE_RANK": "2"}
    # The name that JobSet's service gives the first pod of the first job.
    first = f"pythia-{replicated['name']}-0-0.pythia"
    assert detect_node(pod) == Node(2, 3, (8, 8, 8), first, 29500, "kubernetes")


@pytest.mark.parametrize("nodes", [1, 3])
def test_pytorchjob(nodes: int) -> None:
    found = manifest(Pods(**vars(PODS) | {"nodes": nodes}), "pytorchjob")
    assert (found["apiVersion"], found["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert found["spec"]["nprocPerNode"] == "8"
    replicas = found["spec"]["pytorchReplicaSpecs"]
    assert sum(role["replicas"] for role in replicas.values()) == nodes
    assert set(replicas) == ({"Master", "Worker"} if nodes > 1 else {"Master"})
    for role in replicas.values():
        check_pod(role["template"]["spec"])
        assert role["restartPolicy"] == "OnFailure"
        assert "restartPolicy" not in role["template"]["spec"]
        # The names that the operator looks for: it adds a port of its own if there is none, and then the service that
        # it makes of both is refused.
        (container,) = role["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"
        assert container["ports"] == [{"name": "pytorchjob-port", "containerPort": 29500}]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("My_Run.2", "my-run-2"), ("20B", "neox-20b"), ("!", "neox"), ("a" * 47 + "--b", "a" * 47), ("-x-", "x")],
)
def test_names(name: str, expected: str) -> None:
    """Kubernetes: at most 63 characters of a-z, 0-9 and -, a letter first, also in names of pods."""
    found = spelled(name, nodes=16)
    assert found == expected
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", f"{found}-host-0-15-abcde")


def check_pod(spec: dict[str, Any]) -> None:
    (container,) = spec["containers"]
    assert container["image"] == "registry/neox:1"
    assert container["command"] == ["python", "-u", "train.py", "configs/pythia/160M.yml"]
    assert container["workingDir"] == "/workspace"
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert set(mounts.values()) == set(volumes)
    assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory"}
    assert volumes[mounts["/checkpoints"]]["persistentVolumeClaim"] == {"claimName": "checkpoints"}
    assert spec["terminationGracePeriodSeconds"] >= 60


@pytest.mark.parametrize("kind", ["jobset", "pytorchjob"])
@pytest.mark.parametrize("volume", ["data", ":/data", "data:relative"])
def test_bad_volume(kind: Literal["jobset", "pytorchjob"], volume: str) -> None:
    with pytest.raises(LaunchError, match="is not CLAIM:PATH"):
        manifest(Pods(**vars(PODS) | {"volumes": [volume]}), kind)
