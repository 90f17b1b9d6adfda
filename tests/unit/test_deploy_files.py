"""The files that people deploy with are valid, locked down, and agree with the code. Nothing is run or fetched."""

from __future__ import annotations

import re
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from grpo_core.spec import JobSpec
from jobs.queue import make_celery, queue_for
from jobs.settings import QueueSettings
from jobs.worker import WorkerSettings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
SETTINGS = (ROOT / "docs" / "settings.md").read_text()
GRACE = WorkerSettings.model_fields["stop_grace_seconds"].default

# 120 columns as everywhere here; a page of YAML needs no `---` above it.
YAMLLINT = (
    "{extends: default, rules: {document-start: disable, line-length: {max: 120},"
    " comments: {min-spaces-from-content: 2}}}"
)


def run_tool(name: str, *arguments: str | Path) -> None:
    """A linter that is installed beside this Python."""
    tool = Path(sysconfig.get_path("scripts")) / name
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def documents() -> list[dict[str, Any]]:
    return [document for path in MANIFESTS for document in yaml.safe_load_all(path.read_text())]


def pod_templates() -> dict[str, dict[str, Any]]:
    """By kind and name, everything that becomes a pod."""
    found: dict[str, dict[str, Any]] = {}
    for document in documents():
        spec = document.get("spec", {})
        template = spec.get("jobTargetRef", spec).get("template")
        if template:
            found[f"{document['kind']}/{document['metadata']['name']}"] = template
    return found


def settings_in(environment: dict[str, Any]) -> set[str]:
    return {name for name in environment if name.startswith(("GRPO_", "S3_", "REDIS_", "HF_"))}


# --- Images ---


@pytest.mark.parametrize("path", ["Dockerfile", "tests/containers/servers.Containerfile"])
def test_dockerfiles_pass_hadolint(path: str) -> None:
    run_tool("hadolint", ROOT / path)


def test_build_contexts_hold_no_secrets() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored, "what is not named stays out"
    # Later lines win, and compose.env, which holds secrets, lies in a folder that is let in.
    assert ignored.index("deploy/compose*") > ignored.index("!deploy")


# --- Compose ---


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


@pytest.mark.parametrize("path", [*DEPLOY.glob("*.yaml"), *MANIFESTS], ids=lambda path: path.name)
def test_yaml_is_clean(path: Path) -> None:
    run_tool("yamllint", "--strict", "--config-data", YAMLLINT, path)


def test_every_service_is_locked_down_and_watched(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == "unless-stopped", name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        # Ours bring a health check with their image.
        assert "healthcheck" in service or "build" in service, name
        tag = service["image"].rpartition(":")[2]
        assert "build" in service or re.fullmatch(r"[0-9.]+", tag), f"{name} is not pinned"


def test_every_variable_without_a_default_is_in_the_example(compose: dict[str, Any]) -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    example = set(re.findall(r"^#?([A-Z0-9_]+)=", (DEPLOY / "compose.env.example").read_text(), re.MULTILINE))
    used = set(re.findall(r"(?<!\$)\$\{([A-Z0-9_]+)", text))
    assert used - example == {"GRPO_TAG"}
    generated = set(re.findall(r"^([A-Z0-9_]+)=GENERATE$", (DEPLOY / "compose.env.example").read_text(), re.MULTILINE))
    assert generated == {name for name in used if f"${{{name}:?" in text}, (
        "a secret without a value must stop the start"
    )


def test_compose_sets_what_the_code_reads(compose: dict[str, Any]) -> None:
    for name in ("api", "worker"):
        environment = compose["services"][name]["environment"]
        assert [variable for variable in settings_in(environment) if f"`{variable}`" not in SETTINGS] == []
    assert seconds(compose["services"]["worker"]["stop_grace_period"]) > GRACE


def test_the_gpu_file_changes_only_what_is_there(compose: dict[str, Any]) -> None:
    override = yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text())
    assert override["services"].keys() == {"worker"}
    assert override["services"]["worker"]["build"]["args"] == {"EXTRA": "cuda"}


def test_the_monitoring_file_adds_locked_down_services_and_mounts_what_is_there() -> None:
    added = yaml.safe_load((DEPLOY / "compose.monitoring.yaml").read_text())
    for name, service in added["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert re.fullmatch(r"v?[0-9.]+", service["image"].rpartition(":")[2]), f"{name} is not pinned"
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (DEPLOY / source).is_dir() if source.startswith(".") else source in added["volumes"], volume
    scraper = yaml.safe_load((DEPLOY / "grafana" / "prometheus" / "prometheus.yaml").read_text())
    (job,) = scraper["scrape_configs"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{added['services']['prometheus']['secrets'][0]}"
    assert scraper["rule_files"] == ["/etc/prometheus/alerts.yaml"]
    provider = yaml.safe_load((DEPLOY / "grafana" / "provisioning" / "dashboards" / "grpo.yaml").read_text())
    mounts = [volume.split(":")[1] for volume in added["services"]["grafana"]["volumes"]]
    assert provider["providers"][0]["options"]["path"] in mounts


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


# --- Kubernetes ---


def test_manifests_are_valid() -> None:
    version = kubernetes_validate.latest_version()
    for document in documents():
        if document["apiVersion"].startswith("keda.sh/"):
            continue
        if document["kind"] == "Kustomization":
            continue
        kubernetes_validate.validate(document, version, strict=True)


def test_the_jobs_that_keda_makes_are_valid() -> None:
    scaled = next(document for document in documents() if document["kind"] == "ScaledJob")
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": scaled["metadata"],
        "spec": scaled["spec"]["jobTargetRef"],
    }
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)


def test_keda_watches_the_list_that_celery_writes() -> None:
    settings = QueueSettings.model_validate({})
    prefix = make_celery(settings).conf.broker_transport_options["global_keyprefix"]
    scaled = next(document for document in documents() if document["kind"] == "ScaledJob")
    assert scaled["spec"]["triggers"][0]["metadata"]["listName"] == prefix + queue_for(JobSpec(), settings.prefix)


def test_kustomization_names_what_is_there() -> None:
    kustomization = yaml.safe_load((DEPLOY / "kubernetes" / "kustomization.yaml").read_text())
    assert [name for name in kustomization["resources"] if not (DEPLOY / "kubernetes" / name).exists()] == []
    assert "secret.example.yaml" not in kustomization["resources"]
    used = {container["image"] for template in pod_templates().values() for container in template["spec"]["containers"]}
    assert used == {image["name"] for image in kustomization["images"]}


@pytest.mark.parametrize(("name", "template"), pod_templates().items(), ids=pod_templates())
def test_every_pod_is_locked_down(name: str, template: dict[str, Any]) -> None:
    pod = template["spec"]
    assert pod["automountServiceAccountToken"] is False
    # A Service called grpo-api would otherwise set GRPO_API_PORT.
    assert pod["enableServiceLinks"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"]
    if "worker" in name:
        assert pod["terminationGracePeriodSeconds"] > GRACE
        assert not any("livenessProbe" in container for container in pod["containers"])


def test_manifests_set_what_the_code_reads() -> None:
    for document in documents():
        if document["kind"] in ("ConfigMap", "Secret"):
            variables = settings_in(document.get("data") or document["stringData"])
            assert [variable for variable in variables if f"`{variable}`" not in SETTINGS] == []


def test_network_policies_choose_pods_that_exist() -> None:
    labels = [template["metadata"]["labels"] for template in pod_templates().values()]
    for document in documents():
        if document["kind"] == "NetworkPolicy":
            wanted = document["spec"]["podSelector"]["matchLabels"].items()
            assert any(wanted <= each.items() for each in labels), document["metadata"]["name"]
