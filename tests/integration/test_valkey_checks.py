"""A Valkey that would lose jobs is refused at the start, with the remedy; one that becomes so later is told of."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from prometheus_client.parser import text_string_to_metric_families

from deploy.local.ports import pick_port
from deploy.local.process import Child, Service
from deploy.local.valkey import find_binary
from grpo_core.spec import parse_spec
from jobs.errors import Unavailable
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from jobs.store.job_store import JobStore
from jobs.store.valkey_checks import UnsafeValkey, ValkeySettings, ValkeyWatch, judge, look
from tests.integration.running import RunningApi, in_environment, wait_until

Serve = Callable[..., redis.Redis]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts servers of other kinds than this service's own."""
    children: list[Child] = []

    def serve(**settings: str) -> redis.Redis:
        port = pick_port()
        folder = tmp_path / str(port)
        folder.mkdir()
        lines = {"bind": "127.0.0.1", "port": str(port), "save": '""', "appendonly": "yes", **settings}
        config = "\n".join(f"{name.replace('_', '-')} {value}" for name, value in lines.items())
        client = redis.Redis(port=port, decode_responses=True)

        def missing() -> str | None:
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1):
                    return None
            except OSError as error:
                return str(error)

        child = Child(
            Service(
                name=f"valkey-{port}",
                argv=(str(find_binary()), "-"),
                env={"PATH": os.defpath},
                cwd=folder,
                log=folder / "log",
                stdin=config.encode(),
                probe=missing,
            )
        )
        children.append(child)
        child.wait_ready()
        return client

    yield serve
    for child in children:
        child.stop()


def settings_of(client: redis.Redis) -> QueueSettings:
    port = client.connection_pool.connection_kwargs["port"]
    return QueueSettings.model_validate({"redis_url": f"redis://127.0.0.1:{port}/0", "prefix": "t-checks"})


def shards(client: redis.Redis) -> int:
    told: Any = client.execute_command("CLUSTER INFO")
    return int(told["cluster_size"])


def watch(client: redis.Redis, *, volatile: bool = False) -> ValkeyWatch:
    return ValkeyWatch(JobStore(settings_of(client)), ValkeySettings.model_validate({"volatile": volatile}))


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_server_that_evicts_is_refused_by_api_and_worker(
    serve: Serve, storage_settings: StorageSettings, tmp_path: Path, policy: str
) -> None:
    server = serve(maxmemory_policy=policy)
    environment = {**os.environ, **in_environment(storage_settings, settings_of(server))}
    environment |= {"GRPO_API_PORT": str(pick_port()), "GRPO_WORK_DIR": str(tmp_path / "work")}
    with pytest.raises(UnsafeValkey, match=f"maxmemory-policy {policy}.*Set `maxmemory-policy noeviction`"):
        JobService(storage_settings, settings_of(server)).start()
    if policy != "allkeys-lru":
        return
    for program in (["-m", "api", "api"], ["-m", "jobs"]):
        done = subprocess.run(
            [sys.executable, *program], env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode != 0
        assert "maxmemory-policy noeviction" in done.stderr + done.stdout
        assert "Traceback" not in done.stderr


def test_a_server_without_an_append_only_file_needs_a_word(serve: Serve) -> None:
    server = serve(appendonly="no")
    with pytest.raises(UnsafeValkey, match=r"appendonly yes.*GRPO_ALLOW_VOLATILE_VALKEY=1"):
        watch(server).require()
    watch(server, volatile=True).require()


def test_a_cluster_of_several_shards_is_refused_and_one_of_one_is_not(serve: Serve) -> None:
    first, second = (serve(cluster_enabled="yes", cluster_node_timeout="2000") for _ in range(2))
    first.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
    watch(first).require()
    first.execute_command("CLUSTER DELSLOTSRANGE", 8000, 16383)
    second.execute_command("CLUSTER ADDSLOTSRANGE", 8000, 16383)
    port = second.connection_pool.connection_kwargs["port"]
    first.execute_command("CLUSTER MEET", "127.0.0.1", port)
    wait_until(lambda: shards(first) == 2, seconds=30)
    with pytest.raises(UnsafeValkey, match=r"a cluster of 2 shards.*Use a server without cluster mode"):
        watch(first).require()


def test_an_old_server_is_refused_and_what_is_not_told_is_not_taken_for_good() -> None:
    settings = ValkeySettings.model_validate({})
    good: dict[str, Any] = {"redis_version": "6.2.14", "maxmemory_policy": "noeviction", "aof_enabled": 1}
    assert judge(good, None, settings).faults == {}
    assert [*judge({**good, "redis_version": "6.0.20"}, None, settings).faults] == ["valkey_too_old"]
    assert [*judge({**good, "redis_version": "7.2.4", "valkey_version": "8.1.1"}, None, settings).faults] == []
    nothing = judge({}, None, settings)
    assert (nothing.faults, set(nothing.unknown)) == ({}, {"maxmemory-policy", "appendonly", "its version"})


def test_a_server_that_forbids_info_starts_and_says_what_is_not_known(
    serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve()
    server.execute_command("ACL", "SETUSER", "default", "-info")
    watch(server).require()
    assert "valkey_not_known" in capsys.readouterr().out
    assert look(JobStore(settings_of(server)), ValkeySettings()).unknown


def test_what_goes_wrong_later_is_a_warning_and_a_metric(
    serve: Serve, own_bucket: StorageSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    import jobs.store.valkey_checks

    server = serve(maxmemory="200mb")
    api = RunningApi(JobService(own_bucket, settings_of(server)))
    monkeypatch.setattr(jobs.store.valkey_checks, "LOOK_AGAIN_SECONDS", 0)
    with api.run():
        key, _ = api.service.keys.create("prometheus", ["metrics:read"])
        bearer = {"Authorization": f"Bearer {key}"}

        def faults() -> set[str]:
            text = httpx.get(f"{api.url}/metrics", headers=bearer, timeout=20).text
            (family,) = (f for f in text_string_to_metric_families(text) if f.name == "grpo_valkey_fault")
            assert len(family.samples) == len(jobs.store.valkey_checks.FAULTS)
            return {sample.labels["code"] for sample in family.samples if sample.value}

        assert httpx.get(f"{api.url}/readyz", timeout=20).json()["warnings"] == []
        assert faults() == set()
        server.config_set("maxmemory-policy", "allkeys-lru")
        server.config_set("appendonly", "no")
        wait_until(lambda: len(httpx.get(f"{api.url}/readyz", timeout=20).json()["warnings"]) == 2)
        ready = httpx.get(f"{api.url}/readyz", timeout=20)
        assert (ready.status_code, ready.json()["warnings"]) == (200, ["valkey_evicts", "valkey_volatile"])
        assert faults() == {"valkey_evicts", "valkey_volatile"}
        text = httpx.get(f"{api.url}/metrics", headers=bearer, timeout=20).text
        assert "grpo_valkey_memory_limit_bytes 2.097152e+08" in text
        assert "grpo_storage_up 1.0" in text


def test_nothing_is_accepted_before_a_late_server_was_seen_to_be_safe(
    serve: Serve, storage_settings: StorageSettings
) -> None:
    server = serve(maxmemory_policy="allkeys-lru")
    service = JobService(storage_settings, settings_of(server))
    service.check_storage()
    # As where it answers only after the start has stopped waiting for it.
    service._is_started = True
    spec = parse_spec({"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}})
    with pytest.raises(Unavailable, match="has not answered since"):
        service.submit(spec, "ann")
    service.valkey._look()
    with pytest.raises(Unavailable, match=r"not safe for jobs.*maxmemory-policy noeviction"):
        service.submit(spec, "ann")
    server.config_set("maxmemory-policy", "noeviction")
    service.valkey._look()
    assert service.submit(spec, "ann").owner == "ann"
    server.config_set("maxmemory-policy", "allkeys-lru")
    service.valkey._look()
    assert service.submit(spec, "ann").owner == "ann", "what goes wrong later is a warning"
