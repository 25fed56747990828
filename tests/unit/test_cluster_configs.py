"""Every file of cluster_configs/ is what it says: Ray's own checks for `ray up`, the structure of a RayJob, and
entrypoints that our command line accepts.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.job_config import JobConfig
from ray.runtime_env import RuntimeEnv

import elastictrain.cli
from elastictrain.job import parse_job
from elastictrain_actors.dependencies import name_of, own_requirements
from elastictrain_actors.runtime_env import beside_job, env_vars

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "cluster_configs"
FILES = sorted(FOLDER.glob("*.yaml"))
QUANTITY = re.compile(r"^\d+(\.\d+)?(m|Ki|Mi|Gi|Ti)?$")
RUNTIME_ENV_FIELDS = RuntimeEnv.known_fields


def read(name: str) -> dict[str, Any]:
    loaded = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def words_of(command: str) -> list[str]:
    """The arguments that our command line gets from `python -m elastictrain.cli ...` or `elastictrain ...`."""
    words = shlex.split(command)
    if words[:3] == ["python", "-m", "elastictrain.cli"]:
        return words[3:]
    assert words[0] == "elastictrain", command
    return words[1:]


def accept(command: str) -> Any:
    """Parse as our command line does, without running; raises KeyError or a usage error for what it does not know."""
    name, *arguments = words_of(command)
    group: Any = typer.main.get_command(elastictrain.cli.app)
    return group.commands[name].make_context(name, arguments)


def test_every_file_is_known_to_the_readme_and_to_a_test() -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [file.name for file in FILES] == ["aws-spot.yaml", "kuberay-rayjob.yaml", "laptop.yaml"]
    assert not [file.name for file in FILES if file.name not in readme]


@pytest.mark.parametrize("name", [file.name for file in FILES] + ["README.md"])
def test_the_commands_in_comments_and_readme_are_ours(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    lines = [line.lstrip("# ").split("   ")[0] for line in text.splitlines()]
    pattern = r"^(?:ray job submit .* -- )?((?:elastictrain|python -m elastictrain\.cli) (?:run|submit) .*)$"
    commands = [found.group(1) for line in lines if (found := re.match(pattern, line))]
    assert commands or name == "kuberay-rayjob.yaml"
    for command in commands:
        accept(command)


@pytest.mark.parametrize("name", ["aws-spot.yaml", "laptop.yaml"])
def test_ray_up_accepts(name: str) -> None:
    with_defaults = prepare_config(read(name))
    validate_config(with_defaults)
    for local in read(name).get("file_mounts", {}).values():
        assert (FOLDER / local).exists(), local


def test_ray_up_would_refuse_a_wrong_key() -> None:
    with pytest.raises(Exception, match="node_typ"):
        validate_config(prepare_config(read("aws-spot.yaml") | {"node_typ": {}}))


def test_the_spot_fleet() -> None:
    config = prepare_config(read("aws-spot.yaml"))
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert "InstanceMarketOptions" not in head["node_config"], "the head must not be taken away"
    assert head["resources"]["CPU"] == 0, "no training worker on the head"
    kinds = {node["node_config"]["InstanceType"].split(".")[0] for node in types.values()}
    assert {"g5", "g6", "p4d"} <= kinds, "mixed GPUs"
    for name, node in types.items():
        options = node["node_config"]["InstanceMarketOptions"]
        assert options["MarketType"] == "spot", name
        assert node["resources"]["GPU"] >= 1, name
        assert 0 <= node["min_workers"] <= node["max_workers"] <= config["max_workers"], name
        assert node["node_config"]["ImageId"] == head["node_config"]["ImageId"], "one torch, one driver"
    assert sum(node["min_workers"] for node in types.values()) >= 1
    install = " ".join(config["setup_commands"])
    assert "constraints.txt" in install
    check_extras(install)
    assert any("--autoscaling-config" in command for command in config["head_start_ray_commands"])
    check_dashboard_is_private(config)


def test_the_laptop() -> None:
    config = prepare_config(read("laptop.yaml"))
    assert config["provider"]["head_ip"] == "127.0.0.1"
    assert config["max_workers"] == len(config["provider"]["worker_ips"]) == 0
    check_extras(" ".join(config["setup_commands"]))
    check_dashboard_is_private(config)


def check_dashboard_is_private(config: dict[str, Any]) -> None:
    start = next(command for command in config["head_start_ray_commands"] if "ray start --head" in command)
    assert "--dashboard-host=127.0.0.1" in start, "the jobs API runs whatever it is sent"


def check_extras(install: str) -> None:
    """What is installed exists in our metadata, and the head gets a dashboard."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = re.search(r"elastictrain\[([a-z0-9,]+)\]", install)
    assert found is not None
    extras = found.group(1).split(",")
    assert set(extras) <= set(project["optional-dependencies"])
    assert "submit" in extras
    assert any("ray[default]" in line for line in project["optional-dependencies"]["submit"])


# The RayJob


@pytest.fixture
def ray_job() -> dict[str, Any]:
    return read("kuberay-rayjob.yaml")


def groups(spec: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = spec["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def test_the_rayjob_is_one(ray_job: dict[str, Any]) -> None:
    assert (ray_job["apiVersion"], ray_job["kind"]) == ("ray.io/v1", "RayJob")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,45}[a-z0-9])?", ray_job["metadata"]["name"]), "47 characters at most"
    spec = ray_job["spec"]
    assert set(spec) <= {
        "entrypoint", "runtimeEnvYAML", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit",
        "activeDeadlineSeconds", "submissionMode", "rayClusterSpec",
    }  # fmt: skip
    assert spec["shutdownAfterJobFinishes"] is True, "ttlSecondsAfterFinished means nothing without it"
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["backoffLimit"] == 0
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
    assert set(spec["rayClusterSpec"]) <= {
        "rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs",
    }  # fmt: skip


def test_the_rayjobs_entrypoint_is_a_command_of_ours(ray_job: dict[str, Any]) -> None:
    context = accept(ray_job["spec"]["entrypoint"])
    assert context.info_name == "run"
    assert context.params["as_json"] is True
    job_file = context.params["job_file"]
    mounts = groups(ray_job["spec"])[0]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert any(Path(job_file).is_relative_to(mount["mountPath"]) for mount in mounts)


def test_a_wrong_entrypoint_would_be_seen() -> None:
    with pytest.raises(Exception, match="No such option"):
        accept("elastictrain run job.yaml --jsn")
    with pytest.raises(KeyError, match="trian"):
        accept("python -m elastictrain.cli trian job.yaml")


def test_the_rayjobs_runtime_env_is_one_that_goes_with_ours(ray_job: dict[str, Any]) -> None:
    environment = yaml.safe_load(ray_job["spec"]["runtimeEnvYAML"])
    assert set(environment) <= RUNTIME_ENV_FIELDS
    assert all(isinstance(value, str) for value in environment["env_vars"].values())
    JobConfig(runtime_env=environment)  # Ray's own check
    job = parse_job({"recipe": "a:B", "data": {"kind": "jsonl", "path": "x"}, "steps": 1})
    _, override = beside_job(environment, {"env_vars": env_vars(job)})
    assert not override


def test_the_rayjobs_pods(ray_job: dict[str, Any]) -> None:
    head, *workers = groups(ray_job["spec"])
    assert len(workers) == 2
    assert len({group["groupName"] for group in workers}) == 2
    images = set()
    for group in (head, *workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "Kubernetes takes strings"
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert len(pod["containers"]) == 1
        for container in (*pod["initContainers"], *pod["containers"]):
            images.add(container["image"])
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            for amounts in container["resources"].values():
                assert {"cpu", "memory"} <= set(amounts)
                assert all(isinstance(amount, str) and QUANTITY.match(amount) for amount in amounts.values())
        install = " ".join(pod["initContainers"][0]["args"])
        check_extras(install)
        target = re.search(r"--target (\S+)", install)
        path = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}["PYTHONPATH"]
        assert target is not None
        assert path.split(os.pathsep)[0] == target.group(1), "what is installed is what is imported"
    assert len(images) == 1, "one Python, one torch on all pods"
    assert f":{ray_job['spec']['rayClusterSpec']['rayVersion']}-" in images.pop()


def test_the_rayjobs_head_is_ready_when_jobs_can_be_sent_and_trains_nothing(ray_job: dict[str, Any]) -> None:
    head = groups(ray_job["spec"])[0]
    container = head["template"]["spec"]["containers"][0]
    assert head["rayStartParams"]["num-cpus"] == "0"
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert container["readinessProbe"]["httpGet"] == {"path": "/api/version", "port": ports["dashboard"]}
    assert "nvidia.com/gpu" not in container["resources"]["limits"]


def test_the_rayjobs_workers_have_gpus_and_bounds(ray_job: dict[str, Any]) -> None:
    for group in groups(ray_job["spec"])[1:]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"], group["groupName"]
        resources = group["template"]["spec"]["containers"][0]["resources"]
        assert resources["limits"]["nvidia.com/gpu"] == "1"
        assert resources["limits"] == resources["requests"]


def test_the_pinned_torch_is_the_one_of_the_constraints(ray_job: dict[str, Any]) -> None:
    pin = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    assert f'"{pin}"' in (FOLDER / "kuberay-rayjob.yaml").read_text()
    assert "torch" in {name_of(line) for line in own_requirements()}
