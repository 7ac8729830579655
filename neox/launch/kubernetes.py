"""Kubernetes manifests: one pod a host, each told its number, each starting its own ranks.

JobSet (https://jobset.sigs.k8s.io) numbers the pods and gives the first a name; PyTorchJob (Kubeflow) does so through
torchrun's PET_ variables. Both are read by `neox.launch.node`.
"""

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

from neox.errors import LaunchError
from neox.launch.restarts import REQUEUE_STATUS
from neox.launch.variables import DEFAULT_MASTER_PORT

GRACE_SECONDS = 300
"""Between SIGTERM and SIGKILL: time to save a checkpoint."""

_LONGEST_NAME = 63
"""Characters of a DNS label, which names of pods are."""

_POD_NUMBER = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


@dataclass(frozen=True)
class Pods:
    """What a manifest asks of Kubernetes.

    Attributes:
        name: of the job, in Kubernetes' spelling.
        nodes, gpus_per_node: pods, and GPUs of each.
        tasks_per_node: processes of each pod.
        image: container image with the code and its packages.
        command: script and arguments that every pod runs after `python`.
        folder: working folder in the container; None leaves it to the image.
        volumes: `CLAIM:PATH` for each persistent volume claim.
        max_restarts: how often all pods are started again after one failed.
        requeue_status: exit status of a run that was asked to end early, which does not count as a failure.
        namespace: None leaves it to kubectl.
    """

    name: str
    nodes: int
    gpus_per_node: int
    tasks_per_node: int
    image: str
    command: Sequence[str]
    folder: str | None = None
    volumes: Sequence[str] = ()
    max_restarts: int = 3
    requeue_status: int = REQUEUE_STATUS
    namespace: str | None = None


def spelled(name: str, nodes: int) -> str:
    """A name of so many pods as Kubernetes has it: small letters, digits and dashes, a letter first.

    Short enough for what is appended to it: by JobSet `-host-0-NUMBER-abcde`, by PyTorchJob `-worker-NUMBER`.
    """
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    words = words if words[:1].isalpha() else f"neox-{words}"
    return words[: _LONGEST_NAME - len(f"-host-0-{nodes - 1}-abcde")].rstrip("-")


def manifest(pods: Pods, kind: Literal["jobset", "pytorchjob"]) -> dict[str, Any]:
    """The manifest as a mapping.

    Raises:
        LaunchError: a volume is not `CLAIM:PATH`.
    """
    return _jobset(pods) if kind == "jobset" else _pytorchjob(pods)


def _jobset(pods: Pods) -> dict[str, Any]:
    number = {"valueFrom": {"fieldRef": {"fieldPath": _POD_NUMBER}}}
    variables: list[dict[str, Any]] = [
        {"name": "PET_NNODES", "value": str(pods.nodes)},
        {"name": "PET_NPROC_PER_NODE", "value": str(pods.tasks_per_node)},
        {"name": "PET_NODE_RANK", **number},
        # JobSet names pods JOBSET-JOB-0-NUMBER, in a domain of the JobSet's name.
        {"name": "PET_MASTER_ADDR", "value": f"{pods.name}-host-0-0.{pods.name}"},
        {"name": "PET_MASTER_PORT", "value": str(DEFAULT_MASTER_PORT)},
    ]
    job = {
        "parallelism": pods.nodes,
        "completions": pods.nodes,
        "completionMode": "Indexed",
        # The set restarts as a whole: a pod alone would find nobody to meet.
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": _preemptions(pods)},
        "template": {"spec": _pod(pods, variables, container="train")},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(pods),
        "spec": {
            "failurePolicy": _failure_policy(pods),
            "replicatedJobs": [{"name": "host", "replicas": 1, "template": {"spec": job}}],
        },
    }


def _preemptions(pods: Pods) -> list[dict[str, Any]]:
    """Ends of a pod that are no fault of the run: a job that fails so has the reason PodFailurePolicy."""
    ended_early = {"containerName": "train", "operator": "In", "values": [pods.requeue_status]}
    return [
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": ended_early},
    ]


def _failure_policy(pods: Pods) -> dict[str, Any]:
    if not pods.max_restarts:
        return {"maxRestarts": 0}
    uncounted = {
        "name": "preempted",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    return {"maxRestarts": pods.max_restarts, "rules": [uncounted]}


def _pytorchjob(pods: Pods) -> dict[str, Any]:
    # The operator looks for a container of this name and adds the variables.
    spec = _pod(pods, [], container="pytorch")
    del spec["restartPolicy"]  # the operator's to say
    # So is the port, which it looks for by this name. One of another name would be a second, and Kubernetes refuses a
    # service with two ports of which one has no name.
    spec["containers"][0]["ports"][0]["name"] = "pytorchjob-port"
    replicas = {"Master": 1} | ({"Worker": pods.nodes - 1} if pods.nodes > 1 else {})
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": _metadata(pods),
        "spec": {
            "nprocPerNode": str(pods.tasks_per_node),
            "runPolicy": {"backoffLimit": pods.max_restarts, "cleanPodPolicy": "Running"},
            "pytorchReplicaSpecs": {
                role: {"replicas": count, "restartPolicy": "OnFailure", "template": {"spec": deepcopy(spec)}}
                for role, count in replicas.items()
            },
        },
    }


def _metadata(pods: Pods) -> dict[str, str]:
    return {"name": pods.name} | ({"namespace": pods.namespace} if pods.namespace else {})


def _pod(pods: Pods, variables: list[dict[str, Any]], *, container: str) -> dict[str, Any]:
    claims = [_claim(text) for text in pods.volumes]
    mounts = [{"name": f"claim-{i}", "mountPath": path} for i, (_, path) in enumerate(claims)]
    volumes = [
        {"name": f"claim-{i}", "persistentVolumeClaim": {"claimName": claim}} for i, (claim, _) in enumerate(claims)
    ]
    main: dict[str, Any] = {"name": container, "image": pods.image, "command": ["python", "-u", *pods.command]}
    if pods.folder:
        main["workingDir"] = pods.folder
    main["env"] = variables
    main["ports"] = [{"containerPort": DEFAULT_MASTER_PORT}]
    if pods.gpus_per_node:
        main["resources"] = {"limits": {"nvidia.com/gpu": pods.gpus_per_node}}
    # NCCL and the data loader's workers share memory; containers get 64 MB of it by default.
    main["volumeMounts"] = [{"name": "shared-memory", "mountPath": "/dev/shm"}, *mounts]
    memory = {"name": "shared-memory", "emptyDir": {"medium": "Memory"}}
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "containers": [main],
        "volumes": [memory, *volumes],
    }


def _claim(text: str) -> tuple[str, str]:
    claim, colon, path = text.partition(":")
    if not (claim and colon and path.startswith("/")):
        raise LaunchError(f"--volume {text!r} is not CLAIM:PATH; write checkpoints:/data say")
    return claim, path
