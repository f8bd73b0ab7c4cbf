"""launch/kubernetes/trainjob.yaml: accepted by Kubeflow Trainer's published models, and its values agree."""

import copy
import re

import kubeflow_trainer_api.models as published
import kubernetes_validate
import pytest
import yaml

from adalora_scale.config import load_config
from tests.conftest import ROOT

MANIFEST = ROOT / "launch" / "kubernetes" / "trainjob.yaml"


@pytest.fixture
def objects():
    return {entry["kind"]: entry for entry in yaml.safe_load_all(MANIFEST.read_text())}


def pod_of(runtime):
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    return job["template"]["spec"]["template"]


def validate(objects):
    """By the published models, which drop what they do not know, so nothing may be gone; pods by Kubernetes' schema."""
    for kind, model in (
        ("TrainingRuntime", published.TrainerV1alpha1TrainingRuntime),
        ("TrainJob", published.TrainerV1alpha1TrainJob),
    ):
        entry = objects[kind]
        assert entry["kind"] == kind and entry["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
        assert without_quantities(model.from_dict(copy.deepcopy(entry)).to_dict()) == without_quantities(entry)
    pod = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(pod_of(objects["TrainingRuntime"]))}
    pod["metadata"]["name"] = "node"
    kubernetes_validate.validate(pod, "1.31", strict=True)


def without_quantities(tree):
    """The models print quantities (512Gi, 8) in a form of their own."""
    if isinstance(tree, dict):
        return {k: without_quantities(v) for k, v in tree.items() if k not in ("limits", "requests", "sizeLimit")}
    return [without_quantities(entry) for entry in tree] if isinstance(tree, list) else tree


def test_the_manifest_is_valid(objects):
    """kubectl apply would refuse it, or drop the misspelt half of it."""
    validate(objects)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("TrainJob", ("kind",), "Trainjob"),
        ("TrainJob", ("spec", "runtimeRef"), None),
        ("TrainJob", ("spec", "trainer", "numNode"), 2),
        ("TrainJob", ("spec", "trainer", "numNodes"), "two"),
        ("TrainingRuntime", ("spec", "mlPolicy", "pytorch"), {}),
        ("TrainingRuntime", ("spec", "template", "spec", "failurePolicy", "maxRestart"), 1),
    ],
)
def test_the_validation_finds_mistakes(objects, kind, path, value):
    """Else the test above passes on anything."""
    place = objects[kind]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises((ValueError, AssertionError, KeyError)):
        validate(objects)


def test_repeated_values_agree(objects):
    """Without a renderer nothing else keeps the numbers of nodes and GPUs, and the runtime's name, the same."""
    runtime, job = objects["TrainingRuntime"], objects["TrainJob"]
    trainer = job["spec"]["trainer"]
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert trainer["numNodes"] == runtime["spec"]["mlPolicy"]["numNodes"]
    limits, requests = trainer["resourcesPerNode"]["limits"], trainer["resourcesPerNode"]["requests"]
    assert trainer["numProcPerNode"] == limits["nvidia.com/gpu"] == requests["nvidia.com/gpu"]
    assert limits["rdma/hca"] == requests["rdma/hca"]


def test_the_pod_can_train(objects):
    """Its names are those the controller looks for; its user, shared memory and files those of the image."""
    (job,) = objects["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"]
    pod = pod_of(objects["TrainingRuntime"])["spec"]
    (container,) = pod["containers"]
    assert job["name"] == container["name"] == "node"
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]} and mounts["shm"] == "/dev/shm"
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    assert f"WORKDIR {container['workingDir']}\n" in dockerfile
    assert f"USER {pod['securityContext']['runAsUser']}\n" in dockerfile
    assert container["command"][0] == "bash" and (ROOT / container["command"][1]).is_file()
    words = objects["TrainJob"]["spec"]["trainer"]["args"]
    overrides = [word for word in words if re.match(r"\w+\.\w+=", word)]
    output_dir = load_config(ROOT / words[words.index("--config") + 1], overrides).training["output_dir"]
    assert output_dir.startswith(mounts["runs"] + "/")


def test_the_script_reads_what_the_controller_says():
    """A pod that ignores PET_ variables trains alone."""
    script = (ROOT / "launch" / "torchrun.sh").read_text()
    for name in ("PET_NNODES", "PET_NPROC_PER_NODE", "PET_MASTER_ADDR", "PET_MASTER_PORT"):
        assert f"${{{name}:" in script
