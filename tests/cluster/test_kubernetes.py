"""launch/kubernetes/pytorchjob.yaml: accepted by the API, and its repeated values agree. No cluster runs here."""

import copy
import json
import re
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from adalora_scale.config import load_config
from tests.conftest import ROOT

MANIFEST = ROOT / "launch" / "kubernetes" / "pytorchjob.yaml"
SCHEMA = json.loads(Path(__file__).with_name("pytorchjob_schema.json").read_text())


@pytest.fixture
def job():
    return yaml.safe_load(MANIFEST.read_text())


def validate(job):
    """The job by the resource definition's fields, its pods by Kubernetes' own schema, both without unknown fields."""
    jsonschema.validate(job, SCHEMA)
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "worker"}} | copy.deepcopy(replica["template"])
        pod["metadata"]["name"] = "worker"
        kubernetes_validate.validate(pod, "1.31", strict=True)


def test_the_manifest_is_valid(job):
    """kubectl apply would refuse it, or drop the misspelt half of it."""
    validate(job)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("kind",), "PytorchJob"),
        (("spec", "nprocPerNode"), 8),
        (("spec", "runPolicy", "cleanPodPolicy"), "Sometimes"),
        (("spec", "runPolicy", "backOffLimit"), 3),
        (("spec", "pytorchReplicaSpecs", "Worker", "restartPolicy"), "OnError"),
        (("spec", "pytorchReplicaSpecs", "Worker", "template", "spec", "volume"), []),
        (("spec", "pytorchReplicaSpecs", "Worker", "template", "spec", "containers", 0, "workingDirectory"), "/x"),
        (("spec", "pytorchReplicaSpecs", "Worker", "template", "spec", "volumes", 0, "emptyDir", "size"), "1Gi"),
    ],
)
def test_the_validation_finds_mistakes(job, path, value):
    """Else the test above passes on anything."""
    place = job
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(job)


def test_repeated_values_agree(job):
    """Without a renderer nothing else keeps the number of nodes and of GPUs the same everywhere."""
    spec = job["spec"]
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    (container,) = worker["template"]["spec"]["containers"]
    assert (
        spec["elasticPolicy"]["maxReplicas"]
        == worker["replicas"]
        == spec["runPolicy"]["schedulingPolicy"]["minAvailable"]
    )
    assert spec["elasticPolicy"]["minReplicas"] <= worker["replicas"]
    limits, requests = container["resources"]["limits"], container["resources"]["requests"]
    assert int(spec["nprocPerNode"]) == limits["nvidia.com/gpu"] == requests["nvidia.com/gpu"]
    assert limits["rdma/hca"] == requests["rdma/hca"]


def test_the_pod_can_train(job):
    """The container's name, its shared memory, its user and the files it starts are what operator and image expect."""
    pod = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounts.keys() == volumes.keys()
    assert mounts["shm"] == "/dev/shm" and volumes["shm"]["emptyDir"]["medium"] == "Memory"
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    assert f"WORKDIR {container['workingDir']}\n" in dockerfile
    assert f"USER {pod['securityContext']['runAsUser']}\n" in dockerfile
    assert container["command"][0] == "bash" and (ROOT / container["command"][1]).is_file()
    config = ROOT / container["args"][container["args"].index("--config") + 1]
    overrides = [word for word in container["args"] if re.match(r"\w+\.\w+=", word)]
    output_dir = load_config(config, overrides).training["output_dir"]
    logs = next(variable["value"] for variable in container["env"] if variable["name"] == "ADALORA_LOG_DIR")
    assert output_dir.startswith(mounts["runs"] + "/") and logs.startswith(mounts["runs"] + "/")


def test_the_script_reads_what_the_operator_says():
    """A pod that ignores PET_ variables trains alone."""
    script = (ROOT / "launch" / "torchrun.sh").read_text()
    for name in ("PET_NNODES", "PET_RDZV_ENDPOINT", "PET_MAX_RESTARTS", "PET_NPROC_PER_NODE", "PET_RDZV_ID"):
        assert f"${{{name}:-" in script
