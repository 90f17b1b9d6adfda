"""The alarms of deploy/grafana go off when they should: each on made-up series, by Prometheus' own tool."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ALERTS = HERE.parents[1] / "deploy" / "grafana" / "prometheus" / "alerts.yaml"
CASES = HERE / "alerts.test.yaml"
PROMTOOL = os.environ.get("GRPO_TEST_PROMTOOL") or shutil.which("promtool")


def test_each_alarm_has_a_case_in_which_it_goes_off() -> None:
    cases = CASES.read_text()
    for name in re.findall(r"- alert: (\w+)", ALERTS.read_text()):
        assert re.search(rf"alertname: {name}\n\s+exp_alerts:", cases), name


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool here (Debian: prometheus); or name one in GRPO_TEST_PROMTOOL")
def test_the_alarms_go_off_when_they_should() -> None:
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, "test", "rules", CASES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
