"""The files that people deploy with are valid, locked down, and agree with the code. Nothing is run or fetched."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kubernetes_validate
import pytest
import yaml

from deploy import ray_node
from deploy.kubernetes import one_job
from deploy.local.seaweedfs import SeaweedFS
from grpo_core import __version__, processes
from grpo_core.spec import JobSpec
from jobs.lifecycle.celery_app import make_celery
from jobs.settings import QueueSettings
from jobs.store.queues import queue_for, with_formats
from jobs.worker.worker import WorkerSettings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
OTHERS = ("keda.sh/", "ray.io/", "kueue.x-k8s.io/")
"""Kinds that Kubernetes itself does not know."""
RELEASE = ROOT / ".github" / "workflows" / "release.yml"
SETTINGS = (ROOT / "docs" / "reference" / "settings.md").read_text()
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
        template = spec.get("jobTargetRef", spec.get("headGroupSpec", spec)).get("template")
        if template:
            found[f"{document['kind']}/{document['metadata']['name']}"] = template
    return found


def settings_in(environment: dict[str, Any]) -> set[str]:
    return {name for name in environment if name.startswith(("GRPO_", "S3_", "REDIS_", "HF_"))}


# --- Images ---


@pytest.mark.parametrize("path", ["Dockerfile", "tests/containers/servers.Containerfile"])
def test_dockerfiles_pass_hadolint(path: str) -> None:
    run_tool("hadolint", ROOT / path)


def test_the_releases_actions_are_named_by_commit_and_the_scan_comes_before_the_signature() -> None:
    job = yaml.safe_load(RELEASE.read_text())["jobs"]["images"]
    used = [step["uses"] for step in job["steps"] if "uses" in step]
    assert [action for action in used if not re.fullmatch(r"[a-z-]+/[a-z-]+@[0-9a-f]{40}", action)] == []
    names = [action.partition("@")[0] for action in used]
    order = ["docker/build-push-action", "aquasecurity/trivy-action", "actions/attest-build-provenance"]
    assert [name for name in names if name in order] == order
    build = next(step["with"] for step in job["steps"] if step.get("id") == "build")
    assert (build["sbom"], build["provenance"]) == (True, "mode=max")
    assert "BASE=${{ steps.base.outputs.name }}" in build["build-args"]
    assert re.search(r"^ARG BASE=\S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    targets = {line["target"] for line in job["strategy"]["matrix"]["include"]}
    assert targets == {"api", "worker"}


@pytest.mark.parametrize("extra", ["cpu", "cuda", "native"])
@pytest.mark.parametrize("find_links", ["", "/a/folder/of/cpu/builds"])
def test_everything_that_is_installed_is_named_with_its_hash(extra: str, find_links: str) -> None:
    path = f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"
    script = [DEPLOY / "requirements.sh", "--extra", "worker", "--extra", extra]
    env = {**os.environ, "PATH": path, "UV_FIND_LINKS": find_links}
    text = subprocess.run(script, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    entries = re.split(r"\n(?=[a-z0-9])", "\n".join(line for line in text.splitlines() if not line.startswith("#")))
    assert len(entries) > 50
    assert [entry.splitlines()[0] for entry in entries if "--hash=sha256:" not in entry] == []
    (torch,) = (entry for entry in entries if entry.lstrip().startswith("torch=="))
    locked = re.search(r'name = "torch"\nversion = "(2\.13[^"]+)"', (ROOT / "uv.lock").read_text())
    assert locked
    from_cpu_builds = bool(find_links) and extra == "cpu"
    # For each Python of `requires-python`, as the lock has it for the other builds.
    assert torch.startswith(f"torch=={locked[1]}+cpu ") == from_cpu_builds
    assert any(entry.startswith("nvidia-") for entry in entries) != from_cpu_builds
    if from_cpu_builds:
        assert torch.count("--hash") == 3
    names = {re.split(r"[=\[]", entry, maxsplit=1)[0] for entry in entries}
    assert {"vllm", "unsloth", "unsloth-zoo"} & names == (
        {"vllm", "unsloth", "unsloth-zoo"} if extra == "cuda" else set()
    )


def test_the_small_gpu_image_has_the_libraries_of_the_large_one() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras["cuda"]) - set(extras["native"]) == {
        line for line in extras["cuda"] if line.startswith(("unsloth", "vllm"))
    }
    assert set(extras["native"]) < set(extras["cuda"])
    images = yaml.safe_load(RELEASE.read_text())["jobs"]["images"]["strategy"]["matrix"]["include"]
    assert {line["extra"] for line in images} == {"cpu", "cuda", "native"}


def test_nothing_is_installed_without_its_hash() -> None:
    for name in ("Makefile", "Dockerfile"):
        text = re.sub(r"\\\n", " ", (ROOT / name).read_text())
        for command in re.findall(r"pip install [^\n&]*", text):
            ours = "--no-deps" in command and ("--editable ." in command or "/dist/*.whl" in command)
            assert "--require-hashes" in command or ours, f"{name}: {command}"


def test_build_contexts_hold_no_secrets() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored, "what is not named stays out"
    # Later lines win, and compose.env, which holds secrets, lies in a folder that is let in.
    assert ignored.index("deploy/compose*") > ignored.index("!deploy")


# --- Compose ---


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


@pytest.mark.parametrize("path", [*DEPLOY.glob("*.yaml"), *MANIFESTS, RELEASE], ids=lambda path: path.name)
def test_yaml_is_clean(path: Path) -> None:
    run_tool("yamllint", "--strict", "--config-data", YAMLLINT, path)


def test_every_service_is_locked_down_and_watched(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        # What the others wait for the end of runs once.
        once = name in waited_for(compose, "service_completed_successfully")
        assert service["restart"] == ("no" if once else "unless-stopped"), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        # Ours bring a health check with their image.
        assert "healthcheck" in service or "build" in service, name
        tag = service["image"].rpartition(":")[2]
        assert "build" in service or re.fullmatch(r"[0-9.]+", tag), f"{name} is not pinned"


def waited_for(compose: dict[str, Any], condition: str) -> set[str]:
    """The services that others wait for, until they are in this condition."""
    waits = [service.get("depends_on", {}).items() for service in compose["services"].values()]
    return {name for wait in waits for name, how in wait if how["condition"] == condition}


def test_seaweedfs_starts_behind_its_certificates(compose: dict[str, Any]) -> None:
    services = compose["services"]
    store, maker = services["seaweedfs"], services["certificates"]
    assert waited_for(compose, "service_completed_successfully") == {"certificates"}
    (volume,) = maker["volumes"]
    name, _, folder = volume.partition(":")
    assert maker["command"] == ["python", "-m", "deploy.certificates", folder]
    # The last of the folders in which SeaweedFS looks for security.toml; and the maker's files are for its user only.
    assert folder == "/etc/seaweedfs"
    assert f"{volume}:ro" in store["volumes"]
    assert maker["user"] == store["user"]
    assert maker["network_mode"] == "none"
    assert name in compose["volumes"]
    assert [other for other, service in services.items() if name in str(service.get("volumes"))] == [
        "certificates",
        "seaweedfs",
    ]
    assert "-disableHttp" in store["command"]
    assert any("9333/healthz" in word for word in store["healthcheck"]["test"])


def test_compose_and_grpo_up_start_the_same_store(compose: dict[str, Any], tmp_path: Path) -> None:
    """A flag that closes something in the one and is forgotten in the other would go unseen."""
    local = SeaweedFS(data=tmp_path, port=8333, access_key="key", secret_key="secret", log=tmp_path / "log").service()
    ours = {word for word in local.argv if word.startswith("-")}
    theirs = {word for word in compose["services"]["seaweedfs"]["command"] if word.startswith("-")}

    def only(words: set[str], others: set[str]) -> set[str]:
        return {word.split("=")[0] for word in words - others}

    ports = {word.split("=")[0] for word in ours if ".port" in word and not word.endswith("=0")}
    sockets = {"-filer.localSocket", "-s3.localSocket"}
    assert only(ours, theirs) - ports == {"-dir", "-ip.bind", "-volume.preStopSeconds", *sockets}
    assert only(theirs, ours) == {"-dir", "-ip.bind"}
    closed = {name for name in local.env if name.startswith("WEED_")}
    assert closed == {name for name in compose["services"]["seaweedfs"]["environment"] if name.startswith("WEED_")}


def test_every_variable_without_a_default_is_in_the_example(compose: dict[str, Any]) -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    example = set(re.findall(r"^#?([A-Z0-9_]+)=", (DEPLOY / "compose.env.example").read_text(), re.MULTILINE))
    used = set(re.findall(r"(?<!\$)\$\{([A-Z0-9_]+)", text))
    assert used - example == {"GRPO_TAG"}
    generated = set(re.findall(r"^([A-Z0-9_]+)=GENERATE$", (DEPLOY / "compose.env.example").read_text(), re.MULTILINE))
    # Files of earlier releases have no sealing key, and the API warns.
    assert generated - {"GRPO_SEALING_KEYS"} == {name for name in used if f"${{{name}:?" in text}, (
        "a secret without a value must stop the start"
    )


def test_compose_sets_what_the_code_reads(compose: dict[str, Any]) -> None:
    for name in ("api", "worker"):
        environment = compose["services"][name]["environment"]
        assert [variable for variable in settings_in(environment) if f"`{variable}`" not in SETTINGS] == []
    assert "GRPO_SEALING_KEYS" in compose["services"]["api"]["environment"]
    assert "GRPO_SEALING_KEYS" not in compose["services"]["worker"]["environment"]
    assert seconds(compose["services"]["worker"]["stop_grace_period"]) > GRACE


def test_the_gpu_file_changes_only_what_is_there(compose: dict[str, Any]) -> None:
    override = yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text())
    assert override["services"].keys() == {"worker"}
    assert override["services"]["worker"]["build"]["args"] == {"EXTRA": "${GRPO_GPU_EXTRA:-cuda}"}


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
        if document["apiVersion"].startswith(OTHERS):
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


def test_the_pods_that_kuberay_makes_are_valid_and_alike() -> None:
    (cluster,) = (document for document in documents() if document["kind"] == "RayCluster")
    head, (hosts,) = cluster["spec"]["headGroupSpec"], cluster["spec"]["workerGroupSpecs"]
    assert head["template"] == hosts["template"], "every host of a gang has the same cards and the same image"
    pod = {"apiVersion": "v1", "kind": "Pod", **head["template"]}
    kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
    assert set(head) == {"rayStartParams", "template"}
    assert set(hosts) - set(head) == {"groupName", "replicas", "minReplicas", "maxReplicas"}
    assert cluster["spec"]["rayVersion"] == locked("ray")
    assert cluster["metadata"]["annotations"]["ray.io/overwrite-container-cmd"] == "true"
    (container,) = pod["spec"]["containers"]
    assert container["command"][1:] == ["-m", "deploy.ray_node"]


def test_the_ray_cluster_fits_the_quota_that_admits_it() -> None:
    found = {document["kind"]: document for document in documents()}
    cluster, queue, quota = (found[kind] for kind in ("RayCluster", "LocalQueue", "ClusterQueue"))
    assert cluster["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == queue["metadata"]["name"]
    assert queue["spec"]["clusterQueue"] == quota["metadata"]["name"]
    (group,) = quota["spec"]["resourceGroups"]
    (flavor,) = group["flavors"]
    assert flavor["name"] == found["ResourceFlavor"]["metadata"]["name"]
    quotas = {one["name"]: one["nominalQuota"] for one in flavor["resources"]}
    (hosts,) = cluster["spec"]["workerGroupSpecs"]
    asked = hosts["template"]["spec"]["containers"][0]["resources"]["requests"]
    assert group["coveredResources"] == list(quotas) == list(asked)
    for name, each in asked.items():
        assert int(quotas[name].removesuffix("Gi")) == (1 + hosts["replicas"]) * int(each.removesuffix("Gi")), name


def test_ray_is_started_for_nobody_else() -> None:
    settings = {"RAY_AUTH_MODE": "token", "GRPO_RAY_HOST": "10.0.0.1", "GRPO_RAY_ADDRESS": "10.0.0.1:6379"}
    head = ray_node.command(settings)
    assert {"--head", "--port=6379", "--include-dashboard=false", "--node-ip-address=10.0.0.1"} <= set(head)
    other = ray_node.command(settings | {"GRPO_RAY_HOST": "10.0.0.2"})
    assert "--address=10.0.0.1:6379" in other
    assert "--head" not in other
    generated = "ulimit -n 65536; ray start --head --block"
    assert ray_node.command(settings | {"KUBERAY_GEN_RAY_START_CMD": generated}) == ["sh", "-c", generated]
    for wrong in (
        {"RAY_AUTH_MODE": ""},
        {"GRPO_RAY_HOST": ""},
        {"GRPO_RAY_HOST": "8.8.8.8"},
        {"GRPO_RAY_ADDRESS": "h"},
    ):
        with pytest.raises(ray_node.Refused):
            ray_node.command(settings | wrong)


def test_the_hosts_of_compose_are_locked_down_and_named_in_the_docs() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.hosts.yaml").read_text())
    (host,) = compose["services"].values()
    assert (host["read_only"], host["cap_drop"], host["security_opt"]) == (True, ["ALL"], ["no-new-privileges"])
    assert float(host["stop_grace_period"].removesuffix("s")) > GRACE
    assert [name for name in settings_in(host["environment"]) if f"`{name}`" not in SETTINGS] == []
    assert "token" not in str(host["environment"]["RAY_AUTH_TOKEN_PATH"]).removesuffix("ray_token")
    page = (ROOT / "docs" / "how-to" / "several-hosts.md").read_text()
    assert "deploy/compose.hosts.yaml" in page
    for port in ray_node.PORTS.values():
        assert str(port) in page


def locked(name: str) -> str:
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    return next(package["version"] for package in packages if package["name"] == name)


def test_keda_watches_the_list_that_celery_writes() -> None:
    settings = QueueSettings.model_validate({})
    prefix = make_celery(settings).conf.broker_transport_options["global_keyprefix"]
    scaled = next(document for document in documents() if document["kind"] == "ScaledJob")
    lists = [trigger["metadata"]["listName"] for trigger in scaled["spec"]["triggers"]]
    assert lists == [prefix + queue for queue in with_formats([queue_for(JobSpec(), settings.prefix)])]


def test_kustomization_names_what_is_there() -> None:
    kustomization = yaml.safe_load((DEPLOY / "kubernetes" / "kustomization.yaml").read_text())
    assert [name for name in kustomization["resources"] if not (DEPLOY / "kubernetes" / name).exists()] == []
    assert "secret.example.yaml" not in kustomization["resources"]
    assert {image["newTag"] for image in kustomization["images"]} == {__version__}
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


def reached_from(pod: str) -> list[dict[str, Any]]:
    """The rules that let a pod connect to something."""
    labels = pod_templates()[pod]["metadata"]["labels"].items()
    policies = [document["spec"] for document in documents() if document["kind"] == "NetworkPolicy"]
    chosen = [policy for policy in policies if policy["podSelector"]["matchLabels"].items() <= labels]
    assert any(policy["policyTypes"] == ["Ingress", "Egress"] and policy.keys() == {"podSelector", "policyTypes"}
               for policy in chosen), "everything is denied but what is listed"  # fmt: skip
    return [rule for policy in chosen for rule in policy.get("egress", [])]


@pytest.mark.parametrize("pod", pod_templates())
def test_pods_connect_to_single_hosts_on_single_ports(pod: str) -> None:
    ports: set[int] = set()
    each_other = {"to": [{"podSelector": {"matchLabels": {"app.kubernetes.io/component": "ray-host"}}}]}
    rules = reached_from(pod)
    assert (each_other in rules) == pod.startswith("RayCluster/")
    for rule in rules:
        if rule == each_other:
            continue
        assert rule["to"], "to anyone"
        assert rule["ports"], "on any port"
        for peer in rule["to"]:
            assert peer.keys() == {"namespaceSelector", "podSelector"} or peer["ipBlock"]["cidr"].endswith("/32")
        ports |= {port["port"] for port in rule["ports"]}
    servers = {53, 6379, 443}
    assert ports == (servers if pod.endswith("/grpo-api") else servers | {3128})


def test_network_policies_choose_pods_that_exist() -> None:
    labels = [template["metadata"]["labels"] for template in pod_templates().values()]
    for document in documents():
        if document["kind"] == "NetworkPolicy":
            wanted = document["spec"]["podSelector"]["matchLabels"].items()
            assert any(wanted <= each.items() for each in labels), document["metadata"]["name"]


# --- Keys ---


def test_no_init_and_no_health_check_shows_the_keys_of_an_image() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert "ENTRYPOINT" not in text
    assert "--init" not in text
    worker = text[text.index("FROM base AS worker") :]
    assert 'CMD ["python-hidden", "-m", "jobs.health"]' in worker
    assert re.search(r"install --mode 0711 \S+ \S+ \S+ /venv/bin/python-hidden", worker)
    [probe] = [
        container["readinessProbe"]["exec"]["command"]
        for name, template in pod_templates().items()
        for container in template["spec"]["containers"]
        if "worker" in name and "readinessProbe" in container
    ]
    assert probe[0] == "python-hidden"
    compose = [yaml.safe_load(path.read_text()) for path in DEPLOY.glob("compose*.yaml")]
    assert not [name for file in compose for name, service in file["services"].items() if service.get("init")]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_what_may_be_run_and_not_read_hides_its_environment_at_once() -> None:
    python = Path("/usr/bin/python3").resolve()  # others may run it, unlike one in root's home
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        hidden = shutil.copy(python, Path(name, "python-hidden"))
        Path(hidden).chmod(0o711)
        for program, shown in ((python, True), (hidden, False)):
            with subprocess.Popen(
                [program, "-S", "-c", "print(flush=True); input()"],
                env={"KEY": "s3cr3t"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                user=60600,
                group=60600,
                extra_groups=[],
            ) as process:
                assert process.stdout is not None
                process.stdout.readline()
                looked = subprocess.run(
                    ["cat", f"/proc/{process.pid}/environ"],
                    capture_output=True,
                    check=False,
                    user=60600,
                    group=60600,
                    extra_groups=[],
                )
                assert (b"s3cr3t" in looked.stdout) is shown
                process.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_as_process_1_a_program_ends_on_term_before_it_serves() -> None:
    code = "import os, time; from grpo_core.signals import end_on_term; end_on_term(); print(os.getpid(), flush=True); "
    with subprocess.Popen(
        ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", f"{code} time.sleep(60)"],
        stdout=subprocess.PIPE,
        text=True,
    ) as unshare:
        assert unshare.stdout is not None
        assert unshare.stdout.readline() == "1\n"
        [inner] = processes.children(unshare.pid)
        os.kill(inner, signal.SIGTERM)
        assert unshare.wait(10) == 128 + signal.SIGTERM


def test_the_worker_of_one_job_hides_its_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(one_job, "hide_memory", lambda: told.append("hidden"))
    monkeypatch.setattr(one_job, "end_on_term", lambda: None)  # of this process, which goes on
    monkeypatch.setattr(one_job.logs, "configure", lambda: None)

    def worker(*, idle_seconds: float) -> SimpleNamespace:
        return SimpleNamespace(serve=lambda: told.append(f"serves {idle_seconds}"))

    monkeypatch.setattr(one_job, "OneJobWorker", worker)
    monkeypatch.setattr(sys, "argv", ["one_job", "1"])
    one_job.main()
    assert told == ["hidden", "serves 1.0"]
