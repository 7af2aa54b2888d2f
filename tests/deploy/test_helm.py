"""The Helm chart renders what Kubernetes takes, refuses what makes no sense, and keeps the promises of the other deployments."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path
from typing import Any

import helm_python
import httpx
import pytest
import yaml

from deploy import charts
from swarm import __version__
from swarm.config import CoordinatorSettings, PeerSettings
from tests.world import World

ALONE: dict[str, Any] = {"coordinator": {"run": {"existingConfigMap": "run"}}}
each_case = pytest.mark.parametrize("case", charts.CASES, ids=lambda case: case.stem)


def changed(values: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """The values with one more, at `a.b.c`."""
    result = copy.deepcopy(values)
    *parents, last = path.split(".")
    place = result
    for name in parents:
        place = place.setdefault(name, {})
    place[last] = value
    return result


def of_kind(values: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The rendered documents of a kind."""
    return [document for document in charts.rendered(values) if document["kind"] == kind]


def case(name: str) -> dict[str, Any]:
    """The values of a case by name."""
    return charts.values_of(charts.CHART / "ci" / f"{name}.yaml")


def pods(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The specs of all pods."""
    return [document["spec"]["template"]["spec"] for kind in ("Deployment", "DaemonSet") for document in of_kind(values, kind)]


def environment(pod: dict[str, Any]) -> dict[str, Any]:
    """What a pod's first container is given, by name."""
    return {item["name"]: item.get("value", item.get("valueFrom")) for item in pod["containers"][0]["env"]}


@each_case
def test_helm_and_kubernetes_accept(case: Path) -> None:
    """Helm's strict linter has nothing to say, and every document fits the schemas of an old and of the newest Kubernetes."""
    assert list(charts.problems(charts.values_of(case))) == []


def test_the_linter_finds_faults() -> None:
    """A document with a misspelt field is invalid; so the cases above can fail."""
    (deployment,) = of_kind(ALONE, "Deployment")
    deployment["spec"]["replica"] = 2
    assert any("replica" in problem for problem in charts.invalid(deployment))


def test_versions_are_the_packages() -> None:
    """The chart deploys the version that it came with."""
    chart = yaml.safe_load((charts.CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)


def test_the_archive_holds_the_chart_alone(tmp_path: Path) -> None:
    """What these tests render isn't shipped."""
    with tarfile.open(helm_python.package(charts.CHART, destination=tmp_path)) as archive:
        names = archive.getnames()
    assert {"swarm/Chart.yaml", "swarm/values.yaml", "swarm/values.schema.json", "swarm/templates/peers.yaml"} <= set(names)
    assert [name for name in names if name.startswith("swarm/ci/")] == []


def test_the_defaults_need_a_run_and_nothing_else() -> None:
    """Without a manifest there is no coordinator; with one there is, and no peer."""
    with pytest.raises(helm_python.HelmRenderError, match=r"coordinator\.run"):
        charts.rendered({})
    assert [document["metadata"]["name"] for document in of_kind(ALONE, "Deployment")] == ["demo-swarm-coordinator"]
    assert of_kind(ALONE, "DaemonSet") == of_kind(ALONE, "PriorityClass") == of_kind(ALONE, "PodDisruptionBudget") == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("coordinater", {}),
        ("fullnameOverride", "Swarm.1"),
        ("coordinator.replica", 2),
        ("coordinator.replicas", 0),
        ("coordinator.replicas", "3"),
        ("coordinator.database.kind", "mysql"),
        ("coordinator.persistence.accessMode", "ReadWriteMany"),
        ("coordinator.persistence.size", "ten"),
        ("coordinator.advertise", "run.example.org"),
        ("coordinator.settings.max_call", 1),
        ("coordinator.settings.admin_listen", "0.0.0.0:4301"),
        ("coordinator.settings.db", "postgresql://user:password@host/db"),
        ("coordinator.admin.keys", ["me"]),
        ("coordinator.admin.port", 4301),
        ("coordinator.service.port", 70000),
        ("coordinator.image.tag", "latest"),
        ("coordinator.image.digest", "sha256:1"),
        ("coordinator.resources.limits.gpus", "1"),
        ("coordinator.resources.limits.memory", "1 GB"),
        ("coordinator.terminationGracePeriodSeconds", 1),
        ("peers.link", "https://example.org"),
        ("peers.terminationGracePeriodSeconds", 10),
        ("peers.priorityClass.value", 1000),
        ("peers.gpu.devices", 0),
        ("peers.gpu.persistence.hostPath", "var/lib/swarm"),
        ("peers.cpu.securityContext", {"privileged": True}),
        ("networkPolicy.denied", ["metadata"]),
        ("serviceMonitor.interval", 15),
    ],
)  # fmt: skip
def test_the_schema_refuses(path: str, value: object) -> None:
    """A misspelt name or an impossible value ends the installation, and the message names it."""
    with pytest.raises(helm_python.HelmValuesError, match=re.escape(path.rpartition(".")[2])):
        charts.rendered(changed(ALONE, path, value))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"coordinator.replicas": 2}, "coordinator.replicas"),
        ({"coordinator.run.signed": "AAAA"}, "coordinator.run"),
        ({"coordinator.database.kind": "postgresql"}, "coordinator.database.existingSecret"),
        (
            {"coordinator.database": {"kind": "postgresql", "existingSecret": "database"}},
            "coordinator.keys.existingSecret",
        ),
        ({"coordinator.admin.enabled": True}, "coordinator.admin.keys"),
        ({"coordinator.enabled": False}, "nothing is enabled"),
        ({"peers.cpu.enabled": True}, "peers.link"),
        ({"peers.cpu.enabled": True, "peers.link": "swarm://a", "peers.linkSecret.existingSecret": "link"}, "peers.link"),
        (
            {"peers.gpu": {"enabled": True, "devices": 2}, "peers.link": "swarm://a", "peers.hostPort": True},
            "peers.hostPort",
        ),
    ],
)
def test_values_that_do_not_fit_each_other_are_refused(changes: dict[str, object], told: str) -> None:
    """What a schema can't say, the templates do."""
    values = ALONE
    for path, value in changes.items():
        values = changed(values, path, value)
    with pytest.raises(helm_python.HelmRenderError, match=re.escape(told)):
        charts.rendered(values)


def test_the_schema_is_closed_everywhere() -> None:
    """Every object either lists its names or is a map of texts, amounts or Kubernetes' own."""

    def open_objects(schema: dict[str, Any], place: str) -> list[str]:
        items = {"[]": schema["items"]} if "items" in schema else {}
        inside = {**schema.get("properties", {}), **schema.get("$defs", {}), **items}
        found = [each for name, part in inside.items() for each in open_objects(part, f"{place}.{name}")]
        return [*found, place] if "properties" in schema and schema.get("additionalProperties") is not False else found

    schema = json.loads((charts.CHART / "values.schema.json").read_text())
    assert open_objects(schema, "") == []


def test_every_value_is_described_by_the_schema_and_the_other_way_round() -> None:
    """values.yaml shows all there is."""
    schema = json.loads((charts.CHART / "values.schema.json").read_text())
    values = yaml.safe_load((charts.CHART / "values.yaml").read_text())

    def compare(part: dict[str, Any], shown: dict[str, Any], place: str) -> None:
        assert set(part["properties"]) - {"global"} == set(shown), place
        for name, inside in part["properties"].items():
            if "properties" in inside and name not in ("settings", "affinity"):
                compare(inside, shown[name], f"{place}.{name}")

    compare(schema, values, "")


def test_settings_are_those_of_the_programs() -> None:
    """Whatever can be configured can be set here, but for what the chart itself sets; large numbers stay whole."""
    schema = json.loads((charts.CHART / "values.schema.json").read_text())["properties"]
    coordinator = set(schema["coordinator"]["properties"]["settings"]["properties"])
    peer = set(schema["peers"]["properties"]["settings"]["properties"])
    assert set(CoordinatorSettings.model_fields) - coordinator == {
        "listen", "advertise", "metrics", "db", "admin_listen", "admin_keys", "replica_address", "state_dir",
    }  # fmt: skip
    assert set(PeerSettings.model_fields) - peer == {
        "link", "ticket", "link_file", "files", "data", "identity", "data_dir", "gpu", "listen", "announce", "metrics", "threads",
    }  # fmt: skip
    given = environment(pods(case("sqlite"))[0])
    assert given["SWARM_COORDINATOR_MAX_CALLS"] == "4096"
    assert given["SWARM_COORDINATOR_NEW_KEYS_PER_NETWORK_PER_HOUR"] == "10000000"
    assert given["SWARM_COORDINATOR_CALLS_PER_ADDRESS_PER_S"] == "0.5"


@each_case
def test_pods_are_confined(case: Path) -> None:
    """No root, no privileges, no token of the cluster, nothing written but data, and memory has an end."""
    for pod in pods(charts.values_of(case)):
        assert pod["automountServiceAccountToken"] is False
        assert not pod.get("hostNetwork")
        security = pod["securityContext"]
        assert (security["runAsNonRoot"], security["runAsUser"], security["runAsGroup"]) == (True, 10001, 10001)
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            confined = container["securityContext"]
            assert confined["readOnlyRootFilesystem"] is True
            assert confined["allowPrivilegeEscalation"] is False
            assert confined["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
    (account,) = of_kind(charts.values_of(case), "ServiceAccount")
    assert account["automountServiceAccountToken"] is False


@each_case
def test_selectors_find_their_pods(case: Path) -> None:
    """Services, policies and budgets select pods that exist, and ports by names that they have."""
    documents = charts.rendered(charts.values_of(case))
    templates = [document["spec"]["template"] for document in documents if document["kind"] in ("Deployment", "DaemonSet")]
    for document in documents:
        if document["kind"] not in ("Service", "NetworkPolicy", "PodDisruptionBudget", "Deployment", "DaemonSet"):
            continue
        spec = document["spec"]
        selector = spec.get("podSelector", spec.get("selector", {}))
        wanted = selector.get("matchLabels", selector)
        found = [template for template in templates if wanted.items() <= template["metadata"]["labels"].items()]
        assert found, document["metadata"]["name"]
        ports = {port["name"] for template in found for item in template["spec"]["containers"] for port in item["ports"]}
        asked = [port["targetPort"] for port in spec.get("ports", [])]
        asked += [port["port"] for rule in spec.get("ingress", []) for port in rule["ports"]]
        assert {port for port in asked if isinstance(port, str)} <= ports


def test_the_admin_address_is_never_exposed() -> None:
    """Off by default; when it is on, it listens on the pod's loopback, and no Service, port or policy knows it."""
    for values in (ALONE, case("sqlite")):
        documents = charts.rendered(values)
        shown = [document for document in documents if document["kind"] in ("Service", "NetworkPolicy")]
        assert "4301" not in json.dumps(shown)
        (pod,) = pods(values)
        assert [port["containerPort"] for port in pod["containers"][0]["ports"]] == [4300, 9400]
    assert "SWARM_COORDINATOR_ADMIN_LISTEN" not in environment(pods(ALONE)[0])
    assert environment(pods(case("sqlite"))[0])["SWARM_COORDINATOR_ADMIN_LISTEN"] == "127.0.0.1:4301"


def test_one_coordinator_keeps_its_database_on_a_volume() -> None:
    """The old one is gone before the new one begins, and the volume outlives the release."""
    (deployment,) = of_kind(ALONE, "Deployment")
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}
    (claim,) = of_kind(ALONE, "PersistentVolumeClaim")
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    (data,) = [volume for volume in pods(ALONE)[0]["volumes"] if volume["name"] == "data"]
    assert data["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_replicas_share_a_database_and_keys() -> None:
    """They have no volume of their own, are replaced one after the other, and a drain takes one at a time."""
    values = case("postgresql")
    (deployment,) = of_kind(values, "Deployment")
    assert deployment["spec"]["replicas"] == 3
    assert deployment["spec"]["strategy"]["type"] == "RollingUpdate"
    assert of_kind(values, "PersistentVolumeClaim") == []
    assert of_kind(values, "PodDisruptionBudget")[0]["spec"]["maxUnavailable"] == 1
    (pod,) = pods(values)
    assert environment(pod)["SWARM_COORDINATOR_DB"] == {"secretKeyRef": {"name": "swarm-database", "key": "url"}}
    assert environment(pod)["SWARM_COORDINATOR_REPLICA_ADDRESS"] == "$(POD_IP):4300"
    assert "@sha256:" in pod["containers"][0]["image"]
    (policy,) = of_kind(values, "NetworkPolicy")
    assert sorted(port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]) == [53, 53, 4300, 5432]
    assert {document["kind"] for document in charts.rendered(values)} >= {"ServiceMonitor", "ConfigMap"}


def test_peers_run_on_every_gpu_node_and_give_way() -> None:
    """A DaemonSet for nodes with GPUs; its pods are the first to go, and have time to finish a round."""
    values = case("gpu-peers")
    (daemons,) = of_kind(values, "DaemonSet")
    pod = daemons["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert [toleration["key"] for toleration in pod["tolerations"]] == ["nvidia.com/gpu"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    (priority,) = of_kind(values, "PriorityClass")
    assert priority["metadata"]["name"] == pod["priorityClassName"]
    assert (priority["value"] < 0, priority["preemptionPolicy"]) == (True, "Never")
    assert pod["terminationGracePeriodSeconds"] >= 600
    assert environment(pod)["SWARM_ANNOUNCE"] == "$(HOST_IP):4310"
    assert environment(pod)["SWARM_LINK"] == {"secretKeyRef": {"name": "swarm-link", "key": "link"}}
    several = changed(changed(values, "peers.gpu.devices", 4), "peers.hostPort", False)
    (policy,) = of_kind(several, "NetworkPolicy")
    assert policy["spec"]["ingress"][0]["ports"] == [{"protocol": "TCP", "port": 1024, "endPort": 65535}]


def test_probes_ask_what_the_images_ask() -> None:
    """The same page and command as in the images' health checks; a ledger that can't be written doesn't end the process."""
    (coordinator,), (peer,) = pods(ALONE), pods(case("gpu-peers"))
    docker = charts.CHART.parents[1] / "docker"
    probes = coordinator["containers"][0]
    assert f"127.0.0.1:9400{probes['readinessProbe']['httpGet']['path']}'" in (docker / "coordinator.Dockerfile").read_text()
    assert probes["livenessProbe"]["httpGet"]["path"] != "/healthz"
    command = peer["containers"][0]["livenessProbe"]["exec"]["command"]
    assert f"CMD {json.dumps(command)}" in (docker / "peer.Dockerfile").read_text()


@pytest.mark.skipif(shutil.which("cmp") is None, reason="cmp is missing: apt-get install diffutils")
def test_keys_are_put_in_place_once(tmp_path: Path) -> None:
    """The first container copies the Secret's keys, readable by their owner only, and refuses to replace others."""
    (pod,) = pods(case("postgresql"))
    *shell, script = pod["initContainers"][0]["command"]
    here = textwrap.dedent(script).replace("/data/", f"{tmp_path}/data/").replace("/keys/", f"{tmp_path}/keys/")
    (tmp_path / "data").mkdir()
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "coordinator.key").write_text("first")

    def start() -> int:
        return subprocess.run([*shell, here], capture_output=True, check=False).returncode

    kept = tmp_path / "data" / "state" / "coordinator.key"
    assert (start(), kept.read_text(), kept.stat().st_mode & 0o777) == (0, "first", 0o600)
    kept.chmod(0o660)  # what fsGroup does to a volume
    assert (start(), kept.stat().st_mode & 0o777) == (0, 0o600)
    (tmp_path / "keys" / "coordinator.key").write_text("other")
    assert (start() != 0, kept.read_text()) == (True, "first")
    shutil.rmtree(tmp_path / "keys")
    os.remove(kept)
    assert (start(), list((tmp_path / "data" / "state").iterdir())) == (0, [])


def test_a_pods_coordinator_starts_and_answers_its_probes(tmp_path: Path) -> None:
    """The rendered arguments and settings, with this machine's folders and free ports: every probe's page says 200."""
    signed = World().signed_manifest
    (tmp_path / "run.signed").write_bytes(signed.SerializeToString())
    (pod,) = pods(changed(case("sqlite"), "coordinator.admin", {"enabled": False}))
    container = pod["containers"][0]
    here = {"/run-files": str(tmp_path), "0.0.0.0:4300": "127.0.0.1:0", "0.0.0.0:9400": "127.0.0.1:0"}

    def on_this_machine(text: str) -> str:
        return functools.reduce(lambda known, pair: known.replace(*pair), here.items(), text)

    given = {name: value for name, value in environment(pod).items() if isinstance(value, str)}
    given |= {"SWARM_COORDINATOR_STATE_DIR": str(tmp_path / "state"), "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "swarm.cli.main", *map(on_this_machine, container["args"]), "--json"]
    with subprocess.Popen(command, env={**os.environ, **given}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.stdout is not None
            told = json.loads(process.stdout.readline())
            probes = [container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")]
            answers = [httpx.get(f"http://{told['metrics']}{path}", timeout=20).status_code for path in probes]
        finally:
            process.terminate()
    assert answers == [200, 200, 200]
    assert told["link"].startswith("swarm://run.example.org:4300/")
    assert process.returncode == 0
