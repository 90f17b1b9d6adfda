"""KEDA's worker of one job, as a process of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from jobs.settings import QueueSettings, StorageSettings
from tests.acceptance.conftest import FAKE_TRAINER, ROOT


def test_a_worker_that_no_job_comes_to_ends_in_order(
    tmp_path: Path, queue_settings: QueueSettings, storage_settings: StorageSettings
) -> None:
    """However short its patience is: it counts from when the worker listens."""
    environment = {
        **os.environ,
        "REDIS_URL": queue_settings.redis_url.get_secret_value(),
        "GRPO_PREFIX": queue_settings.prefix,
        "S3_ENDPOINT": storage_settings.endpoint,
        "S3_BUCKET": storage_settings.bucket,
        "AWS_ACCESS_KEY_ID": storage_settings.access_key.get_secret_value(),
        "AWS_SECRET_ACCESS_KEY": storage_settings.secret_key.get_secret_value(),
        "GRPO_WORK_DIR": str(tmp_path / "work"),
        "GRPO_LAUNCHER": shlex.join([sys.executable, str(FAKE_TRAINER)]),
    }
    command = [sys.executable, "-m", "deploy.kubernetes.one_job", "0.01"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert '"worker_ready"' in done.stderr + done.stdout
