"""The last write of a run, to the record, while Valkey is away: the outcome stands, so nothing waits for ever."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

from grpo_core.spec import parse_spec
from jobs import conclusion
from jobs.archive import Outcome
from jobs.conclusion import Conclusion
from jobs.ledger import Ledger
from jobs.record import record_of
from jobs.settings import QueueSettings
from jobs.stopping import StopOrder
from jobs.tenure import Tenure, Toolbox


def test_a_worker_that_is_to_stop_leaves_the_record_to_the_sweeper(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(conclusion, "LAST_WORDS_SECONDS", 0.5)
    nobody = Ledger(QueueSettings.model_validate({"redis_url": "redis://127.0.0.1:9/0", "prefix": "none"}))
    asked = {"id": "job-1", "owner": "ann", "created_at": "2026-01-01T00:00:00+00:00", "queue": "grpo.cpu"}
    record = record_of({**asked, "spec": parse_spec({}).as_dict(), "spec_sha256": "0"})
    stop = StopOrder(1.0)
    none = cast("Any", None)
    tools = Toolbox(
        worker="w",
        ledger=nobody,
        archive=none,
        store=none,
        datasets=none,
        outbox=none,
        lease_seconds=60,
        launcher=(),
        stop=stop,
    )
    stop.give()
    began = time.monotonic()
    Conclusion(Tenure(tools, record, 1, tmp_path))._settle(
        Outcome(job="job-1", status="succeeded", epoch=1, time="2026-01-01T00:00:00Z", by="w")
    )
    assert 1.0 < time.monotonic() - began < 8
