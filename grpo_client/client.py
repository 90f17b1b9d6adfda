"""The routes of the API as methods, each with a typed result.

Owns which request a method sends and what is safe to send again; the connection, the event stream and downloads are
separate modules. Invariant: a submission that broke off is sent again under its Idempotency-Key, so it makes one
job; no other request that changes anything is sent twice.
"""

from __future__ import annotations

import builtins
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self, TypedDict, Unpack
from urllib.parse import quote

import httpx

from grpo_client import results
from grpo_client.connection import Connection, retry
from grpo_client.download import Downloads, Progress
from grpo_client.errors import ProblemError, UnreachableError
from grpo_client.events import Deadline, EventStream

RETRY_DELAYS = (0.5, 1.0, 2.0, 4.0, 4.0)
"""Seconds before each further attempt to submit; together longer than a dead attempt holds its key."""
GRADER_SECONDS = 60.0
"""Longer than the service lets graders run."""
CHAT_SECONDS = 600.0
"""Longest time without a token: a request may wait behind others."""
PASSING = frozenset({"unavailable", "idempotency_in_progress", "rate_limited", "too_many_requests"})
"""Problems of a submission that a later attempt may not meet. The second: the attempt that broke off still runs."""
CONTENT_TYPES = {
    ".csv": "text/csv",
    ".tsv": "text/tab-separated-values",
    ".parquet": "application/vnd.apache.parquet",
    ".json": "application/json",
}
"""Files that the service makes into JSON lines, by suffix; all others are JSON lines."""
_UPLOAD_BYTES = 256 * 1024

OnEvent = Callable[[results.Event], None]


class RolloutFilters(TypedDict, total=False):
    """Which completions to read, and in what order."""

    step: int | None
    step_from: int | None
    step_to: int | None
    prompt: str | None
    """A prompt_id: with `step` it gives one group, alone one prompt across steps."""
    reward_lt: float | None
    reward_gt: float | None
    finish: str | None
    """`stop`, or `length` for those cut at the token limit."""
    order: str | None
    """`step`, `reward`, `advantage` or `length`; a minus in front reverses it."""


class GrpoClient:
    """A client of one service with one key. Close it, or use it in a `with` block.

    Without arguments it reads `GRPO_URL` and `GRPO_API_KEY`. Methods raise `ClientError`, and `OSError` for the files
    they read or write.
    """

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        timeout: float = 30.0,
        *,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._connection = Connection(url, key, timeout, transport)
        self._timeout, self._transport = timeout, transport
        self._sends_all = False
        """Whether the service is older than the parameter `fields`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """The address of the service."""
        return self._connection.url

    def close(self) -> None:
        """Close the connections."""
        self._connection.close()
        if "_storage" in self.__dict__:
            self._storage.close()

    def submit(
        self, spec: Mapping[str, Any], *, idempotency_key: str | None = None, priority: str | None = None
    ) -> results.SubmittedJob:
        """Submit a job; returns it as accepted.

        A request whose answer is lost is sent again, under a key that makes it one job however often it is sent. The
        key is a new one, unless you give your own to repeat a submission of an earlier process.
        """
        return results.SubmittedJob(self._submit("/jobs", spec, idempotency_key, priority))

    def submit_group(
        self,
        spec: Mapping[str, Any],
        *,
        grid: Mapping[str, Sequence[Any]] | None = None,
        repeat: int = 1,
        idempotency_key: str | None = None,
        priority: str | None = None,
    ) -> results.SubmittedGroup:
        """Submit a sweep: a job for each combination of the grid's values, each `repeat` times with another seed.

        All of them are accepted, or none. Sent again under the same key, it stays one group.
        """
        sweep = {"spec": spec, "grid": dict(grid or {}), "repeat": repeat}
        return results.SubmittedGroup(self._submit("/groups", sweep, idempotency_key, priority))

    def export(
        self,
        job_id: str,
        *,
        step: int | None = None,
        format: str = "merged",  # noqa: A002 - the field's name
        type: str = "auto",  # noqa: A002 - the field's name
        idempotency_key: str | None = None,
    ) -> results.SubmittedJob:
        """Have a worker write a job's adapter in another form; returns the job that does it.

        `format` is `merged` or `gguf`, `type` is `auto`, `f16`, `bf16`, or for GGUF `q8_0`. Without a `step`, it is the
        best or last adapter. When that job has succeeded, its files are below `export/`.
        """
        asked = {"job": job_id, "format": format, "type": type, **_given(step=step)}
        return results.SubmittedJob(self._submit("/exports", asked, idempotency_key))

    def _submit(
        self, path: str, body: Mapping[str, Any], idempotency_key: str | None, priority: str | None = None
    ) -> dict[str, Any]:
        params = _given(priority=priority)
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        for delay in RETRY_DELAYS:
            try:
                return self._connection.json("POST", path, json=body, headers=headers, params=params)
            except UnreachableError as error:
                if not error.may_pass:
                    raise
            except ProblemError as error:
                if error.code not in PASSING:
                    raise
            time.sleep(delay)
        return self._connection.json("POST", path, json=body, headers=headers, params=params)

    def group(self, group: str) -> results.Group:
        """The jobs of a group as a table, with mean and spread over the repeats of each setting."""
        return results.Group(self._connection.json("GET", _group(group)))

    def cancel_group(self, group: str) -> results.SubmittedGroup:
        """Cancel every job of a group that has not ended; returns all its jobs."""
        return results.SubmittedGroup(self._connection.json("POST", _group(group, "cancel")))

    def compare(self, job_ids: Collection[str]) -> results.Comparison:
        """Any jobs as a table; those that differ by the seed only are repeats, and one row."""
        return results.Comparison(self._connection.json("GET", "/comparison", params={"job": builtins.list(job_ids)}))

    def dry_run(self, spec: Mapping[str, Any]) -> results.DryRun:
        """What a spec would become, with every warning; nothing is stored."""
        return results.DryRun(self._connection.json("POST", "/jobs", json=spec, params={"dry_run": "true"}))

    def get(self, job_id: str, *, poll: float = 1.0, patience: float = 0.0) -> results.JobDetail:
        """One job as it is now. While the service is away, tries every `poll` seconds for `patience` seconds."""
        return self._get(job_id, poll, patience, self._timeout)

    def list(
        self,
        *,
        limit: int = 20,
        cursor: str | None = None,
        status: str | None = None,
        metadata: Mapping[str, str] | None = None,
        group: str | None = None,
        search: str | None = None,
        kind: str | None = None,
        priority: str | None = None,
        owner: str | None = None,
        sort: str | None = None,
        fields: Collection[str] = (),
    ) -> results.JobList:
        """A page of jobs, newest first unless `sort` says otherwise; its `next_cursor` leads to the next.

        `search` is a text in id, name, model or metadata. `owner` is for operators; `*` stands for all. `sort` is
        `created`, `updated`, `name`, `status`, `priority`, `owner` or `reward`, with a minus from the largest.
        `fields`, such as `id` and `spec.model.name`, are all that is sent of each job; an older service sends all.
        """
        pairs = {f"metadata[{key}]": value for key, value in (metadata or {}).items()}
        params = {**pairs, **_given(limit=limit, cursor=cursor, status=status, group=group)}
        params |= _given(search=search, kind=kind, priority=priority, owner=owner, sort=sort)
        return results.JobList(self._narrowed("/jobs", params, fields))

    def cancel(self, job_id: str) -> results.Job:
        """Cancel a job; returns it, `cancelled` or `cancelling`."""
        return results.Job(self._connection.json("POST", _job(job_id, "cancel")))

    def pause(self, job_id: str) -> results.Job:
        """Pause a job; returns it, `paused` or `pausing`. A second call changes nothing."""
        return results.Job(self._connection.json("POST", _job(job_id, "pause")))

    def resume(self, job_id: str) -> results.Job:
        """Put a paused job back into the queue; returns it."""
        return results.Job(self._connection.json("POST", _job(job_id, "resume")))

    def set_priority(self, job_id: str, priority: str) -> results.Job:
        """Change the priority of a queued or paused job: `low`, `normal` or `high`; returns the job."""
        return results.Job(self._connection.json("PATCH", _job(job_id), json={"priority": priority}))

    def act(self, action: str, job_ids: Collection[str]) -> results.ActionList:
        """`cancel`, `pause`, `resume` or `delete` up to 100 jobs; returns what became of each."""
        body = {"action": action, "jobs": builtins.list(job_ids)}
        return results.ActionList(self._connection.json("POST", "/jobs/actions", json=body))

    def delete(self, job_id: str) -> None:
        """Delete a job that has ended, with all its files. This cannot be undone."""
        self._connection.delete(_job(job_id))

    def wait(
        self,
        job_id: str,
        on_event: OnEvent | None = None,
        poll: float = 1.0,
        *,
        timeout: float | None = None,
        patience: float = 60.0,
    ) -> results.JobDetail:
        """Wait until a job has ended, calling `on_event` with each event once; returns the job.

        After `timeout` seconds it raises `WaitTimeoutError`, and the job continues; None waits as long as the job
        takes. `poll` and `patience` as for `stream`.
        """
        deadline = Deadline(job_id, timeout)
        for event in self._stream(job_id, 0, poll, patience, deadline):
            if on_event is not None:
                on_event(event)
        try:
            left = max(0.0, deadline.left)
            return self._get(job_id, poll, min(patience, left), min(self._timeout, left))
        except (UnreachableError, ProblemError):
            deadline.check()
            raise

    def stream(
        self, job_id: str, *, after: int = 0, poll: float = 1.0, timeout: float | None = None, patience: float = 60.0
    ) -> Iterator[results.Event]:
        """Every event numbered above `after`, past and future, each once; ends when the job has ended.

        A broken connection is made again after `poll` seconds and continues where it left off. A service that is away
        for less than `patience` seconds, as during a restart, is waited for. `timeout` as for `wait`.
        """
        yield from self._stream(job_id, after, poll, patience, Deadline(job_id, timeout))

    def events(
        self, job_id: str, *, after: int = 0, limit: int = 100, types: Iterable[str] = ()
    ) -> builtins.list[results.Event]:
        """Up to `limit` events numbered above `after`."""
        params = {"after": after, "limit": limit, "type": [*types]}
        return results.EventList(self._connection.json("GET", _job(job_id, "events"), params=params)).data

    def metrics(self, job_id: str, *, after_step: int = 0) -> builtins.list[results.StepMetrics]:
        """The metrics of each logged step above `after_step`."""
        params = {"after_step": after_step}
        return results.MetricList(self._connection.json("GET", _job(job_id, "metrics"), params=params)).data

    def metrics_csv(self, job_id: str, *, after_step: int = 0) -> str:
        """The same as CSV with a header: one column a number, `rewards.NAME` and `seconds.PHASE` among them."""
        params = {"after_step": after_step, "format": "csv"}
        return self._connection.text(_job(job_id, "metrics"), "text/csv", params)

    def rollouts(
        self, job_id: str, *, limit: int = 50, cursor: str | None = None, **filters: Unpack[RolloutFilters]
    ) -> results.RolloutList:
        """A page of a job's completions with their rewards, also while it runs; `next_cursor` leads to the next."""
        params = _given(limit=limit, cursor=cursor, **{"order": "step", **filters})
        return results.RolloutList(self._connection.json("GET", _job(job_id, "rollouts"), params=params))

    def all_rollouts(
        self, job_id: str, *, limit: int = 500, **filters: Unpack[RolloutFilters]
    ) -> Iterator[results.Rollout]:
        """Every completion that matches, read `limit` at a time."""
        page = self.rollouts(job_id, limit=limit, **filters)
        yield from page.data
        while page.next_cursor:
            page = self.rollouts(job_id, limit=limit, cursor=page.next_cursor, **filters)
            yield from page.data

    def rollout_steps(self, job_id: str) -> builtins.list[results.RolloutStep]:
        """The steps whose completions can be read, each with its prompts and the spread of its rewards."""
        return results.RolloutStepList(self._connection.json("GET", _job(job_id, "rollouts", "steps"))).data

    def checkpoints(self, job_id: str) -> builtins.list[results.Checkpoint]:
        """The checkpoints a job has saved so far, their files with short-lived links."""
        return results.CheckpointList(self._connection.json("GET", _job(job_id, "checkpoints"))).data

    def artifacts(self, job_id: str) -> results.ArtifactList:
        """The job's files in `data`, each with a short-lived link, and whether the list is `complete`."""
        return results.ArtifactList(self._connection.json("GET", _job(job_id, "artifacts")))

    def download(
        self, job_id: str, folder: str | Path, on_progress: Progress | None = None, *, only: Collection[str] = ()
    ) -> builtins.list[results.ArtifactFile]:
        """Save a job's files below `folder`, each checked against its announced hash; returns what was announced.

        Files that are already there and right are not fetched again. `only` names files or folders of the job, such
        as `adapter`, or patterns such as `rollouts/*`; none is all.
        """
        return self._downloads(job_id, on_progress).all(job_id, Path(folder), only)

    def download_file(
        self, job_id: str, path: str, target: str | Path, on_progress: Progress | None = None
    ) -> results.ArtifactFile:
        """Save one of a job's files as `target`, checked against its announced hash; returns what was announced."""
        return self._downloads(job_id, on_progress).one(job_id, path, Path(target))

    def upload_dataset(
        self, path: str | Path, *, name: str | None = None, on_progress: Progress | None = None
    ) -> results.Dataset:
        """Upload JSON lines, or by the suffix CSV, TSV, Parquet or a JSON list; returns the data set, whose `id` a spec
        can name."""
        path = Path(path)
        size = path.stat().st_size
        kind = CONTENT_TYPES.get(path.suffix.lower(), "application/x-ndjson")
        headers = {"Content-Type": kind, "Content-Length": str(size)}
        with path.open("rb") as file:
            content = _chunks(file, path.name, size, on_progress)
            params = _given(name=name)
            return results.Dataset(
                self._connection.json("POST", "/datasets", params=params, content=content, headers=headers)
            )

    def datasets(self, *, limit: int = 20, cursor: str | None = None, owner: str | None = None) -> results.DatasetList:
        """A page of data sets, newest first; its `next_cursor` leads to the next.

        `owner` is for operators: one of them, or `*` for all.
        """
        params = _given(limit=limit, cursor=cursor, owner=owner)
        return results.DatasetList(self._connection.json("GET", "/datasets", params=params))

    def dataset(self, dataset_id: str) -> results.Dataset:
        """One data set."""
        return results.Dataset(self._connection.json("GET", _dataset(dataset_id)))

    def dataset_rows(self, dataset_id: str, *, limit: int = 20, cursor: str | None = None) -> results.RowList:
        """A page of a data set's rows as they are stored; its `next_cursor` leads to the next."""
        params = _given(limit=limit, cursor=cursor)
        return results.RowList(self._connection.json("GET", _dataset(dataset_id, "rows"), params=params))

    def job_rows(
        self,
        job_id: str,
        *,
        part: Literal["train", "held_out"] = "train",
        first: int | None = None,
        search: str | None = None,
        limit: int = 20,
        cursor: str | None = None,
    ) -> results.JobRowList:
        """A page of the rows of a job's data set as its prompts, from the row `first` on; `unavailable` says why there
        are none."""
        params = _given(part=part, first=first, search=search, limit=limit, cursor=cursor)
        return results.JobRowList(self._connection.json("GET", _job(job_id, "rows"), params=params))

    def dataset_jobs(self, dataset_id: str, *, limit: int = 20, cursor: str | None = None) -> results.JobList:
        """A page of the jobs that use a data set, newest first; its `next_cursor` leads to the next."""
        params = _given(limit=limit, cursor=cursor)
        return results.JobList(self._connection.json("GET", _dataset(dataset_id, "jobs"), params=params))

    def delete_dataset(self, dataset_id: str) -> None:
        """Delete an upload that no unfinished job names. This cannot be undone."""
        self._connection.delete(_dataset(dataset_id))

    def rewards(self) -> builtins.list[results.Reward]:
        """The reward functions."""
        return results.RewardList(self._connection.json("GET", "/rewards")).data

    def run_grader(
        self, grader: Mapping[str, Any], model_sample: str, item: Mapping[str, Any] | None = None
    ) -> results.GraderRun:
        """The score of one completion by one grader, before a job uses it."""
        body = {"grader": grader, "item": item or {}, "model_sample": model_sample}
        return results.GraderRun(self._connection.json("POST", "/graders/run", json=body, timeout=GRADER_SECONDS))

    def validate_grader(self, grader: Mapping[str, Any]) -> results.ValidatedGrader:
        """The grader, if a job could use it; else raises `ProblemError` with every problem."""
        body = {"grader": grader}
        return results.ValidatedGrader(
            self._connection.json("POST", "/graders/validate", json=body, timeout=GRADER_SECONDS)
        )

    def score_rows(self, spec: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> results.RowScores:
        """The scores of up to 200 rows, each `{"item": {...}, "model_sample": "..."}`, by all rewards of a spec."""
        body = {"spec": spec, "rows": [*rows]}
        return results.RowScores(self._connection.json("POST", "/graders/score", json=body, timeout=GRADER_SECONDS))

    def create_webhook(self, url: str, events: Iterable[str] | None = None) -> results.Webhook:
        """Register a URL that events of your jobs are posted to; None is all events. Only this answer has `secret`."""
        body = {"url": url, **({} if events is None else {"events": [*events]})}
        return results.Webhook(self._connection.json("POST", "/webhooks", json=body))

    def webhooks(self) -> builtins.list[results.Webhook]:
        """Your webhooks, oldest first."""
        return results.WebhookList(self._connection.json("GET", "/webhooks")).data

    def webhook(self, webhook_id: str) -> results.Webhook:
        """A webhook."""
        return results.Webhook(self._connection.json("GET", _webhook(webhook_id)))

    def test_webhook(self, webhook_id: str) -> results.WebhookDelivery:
        """Send one test event; returns its delivery, which has not ended yet."""
        return results.WebhookDelivery(self._connection.json("POST", _webhook(webhook_id, "test")))

    def webhook_deliveries(self, webhook_id: str, *, limit: int = 20) -> builtins.list[results.WebhookDelivery]:
        """A webhook's last deliveries, newest first."""
        params = {"limit": limit}
        answer = self._connection.json("GET", _webhook(webhook_id, "deliveries"), params=params)
        return results.WebhookDeliveryList(answer).data

    def delete_webhook(self, webhook_id: str) -> None:
        """Delete a webhook with its deliveries."""
        self._connection.delete(_webhook(webhook_id))

    def serve(
        self,
        job_id: str | None = None,
        *,
        model: str | None = None,
        steps: Sequence[int] = (),
        ttl_seconds: int | None = None,
        idle_seconds: int | None = None,
        engine: str | None = None,
        idempotency_key: str | None = None,
    ) -> results.SubmittedJob:
        """Start to serve a job's adapters, or a base `model` alone; returns the session, a job of kind serving.

        `models` lists its models once it answers. Sent again like a submission.
        """
        body = _given(job=job_id, model=model, ttl_seconds=ttl_seconds, idle_seconds=idle_seconds, engine=engine)
        body |= {"steps": [*steps]} if steps else {}
        return results.SubmittedJob(self._submit("/serving", body, idempotency_key))

    def models(self) -> builtins.list[results.ServedModel]:
        """The models that are served now."""
        return results.ServedModelList(self._connection.json("GET", "/v1/models")).data

    def chat(self, model: str, messages: Sequence[Mapping[str, str]], **options: Any) -> dict[str, Any]:
        """The answer of a served model, as OpenAI's chat completion; `options` are OpenAI's parameters."""
        body = {"model": model, "messages": [*messages], **options}
        return self._connection.json("POST", "/v1/chat/completions", json=body, timeout=CHAT_SECONDS)

    def stream_chat(
        self, model: str, messages: Sequence[Mapping[str, str]], **options: Any
    ) -> Iterator[dict[str, Any]]:
        """The same as OpenAI's chunks, as they come. Raises `ProblemError` for an error on the way too."""
        body = {"model": model, "messages": [*messages], **options, "stream": True}
        yield from self._connection.chunks("/v1/chat/completions", body, timeout=CHAT_SECONDS)

    def usage(self) -> results.UsageReport:
        """What the key's owner has used of GPUs and storage, and may use."""
        return results.UsageReport(self._connection.json("GET", "/usage"))

    def keys(self, *, owner: str | None = None, limit: int = 50, cursor: str | None = None) -> results.ApiKeyList:
        """A page of your API keys, newest first, without their secrets.

        `owner` is for operators: one of them, or `*` for all.
        """
        params = _given(owner=owner, limit=limit, cursor=cursor)
        return results.ApiKeyList(self._connection.json("GET", "/keys", params=params))

    def create_key(
        self,
        *,
        scopes: Iterable[str] | None = None,
        name: str | None = None,
        expires_at: datetime | None = None,
        owner: str | None = None,
    ) -> results.ApiKey:
        """Create an API key; only this answer has its secret, as `key`. It gets no scope that your key does not have.

        `owner` is for operators.
        """
        until = None if expires_at is None else expires_at.astimezone(UTC).isoformat()
        body = _given(owner=owner, name=name, expires_at=until, scopes=None if scopes is None else [*scopes])
        return results.ApiKey(self._connection.json("POST", "/keys", json=body))

    def revoke_key(self, key_id: str) -> results.ApiKey:
        """Revoke an API key permanently."""
        return results.ApiKey(self._connection.json("DELETE", f"/keys/{quote(key_id, safe='')}"))

    def owners_usage(self, *, limit: int = 50, cursor: str | None = None) -> results.OwnerUsageList:
        """A page of what every owner has used, by name; its `next_cursor` leads to the next. For operators."""
        params = _given(limit=limit, cursor=cursor)
        return results.OwnerUsageList(self._connection.json("GET", "/usage/owners", params=params))

    def gpu_hours(
        self,
        *,
        since: date | str | None = None,
        until: date | str | None = None,
        by: str = "day",
        owner: str | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> results.GpuHoursList:
        """A page of GPU-hours by period, owner and kind of GPU, from one day (UTC) to another.

        `by` is `day`, `week` or `total`. `owner` is for operators: one of them, or `*` for all.
        """
        params = _given(since=_day(since), until=_day(until), by=by, owner=owner, limit=limit, cursor=cursor)
        return results.GpuHoursList(self._connection.json("GET", "/usage/gpu-hours", params=params))

    def gpu_hours_csv(
        self,
        *,
        since: date | str | None = None,
        until: date | str | None = None,
        by: str = "day",
        owner: str | None = None,
    ) -> str:
        """The same as CSV with a header, all rows at once."""
        params = _given(since=_day(since), until=_day(until), by=by, owner=owner, format="csv")
        return self._connection.text("/usage/gpu-hours", "text/csv", params)

    def workers(self, *, limit: int = 100, cursor: str | None = None) -> results.WorkerList:
        """A page of the fleet, by name; its `next_cursor` leads to the next."""
        return results.WorkerList(self._connection.json("GET", "/workers", params=_given(limit=limit, cursor=cursor)))

    def worker(self, name: str) -> results.Worker:
        """One worker."""
        return results.Worker(self._connection.json("GET", _worker(name)))

    def drain_worker(self, name: str, *, mode: str = "finish") -> results.Worker:
        """Let a worker take no new job; `mode` `checkpoint` also queues its job again. For operators."""
        return results.Worker(self._connection.json("POST", _worker(name, "drain"), json={"mode": mode}))

    def undrain_worker(self, name: str) -> results.Worker:
        """Let a drained worker take jobs again. For operators."""
        return results.Worker(self._connection.json("DELETE", _worker(name, "drain")))

    def service_metrics(self) -> str:
        """The service's own metrics in Prometheus' text format; the key needs the scope metrics:read."""
        return self._connection.text("/metrics", "text/plain")

    @cached_property
    def _storage(self) -> httpx.Client:
        """Another client, since the API's sends the key with every request."""
        return httpx.Client(timeout=self._timeout, transport=self._transport)

    def _downloads(self, job_id: str, on_progress: Progress | None) -> Downloads:
        return Downloads(self._storage, lambda: self.artifacts(job_id), on_progress)

    def _get(self, job_id: str, poll: float, patience: float, timeout: float) -> results.JobDetail:
        return results.JobDetail(
            retry(lambda: self._connection.json("GET", _job(job_id), timeout=timeout), poll, patience)
        )

    def _narrowed(self, path: str, params: dict[str, Any], fields: Collection[str]) -> dict[str, Any]:
        """What is at `path`, with these fields alone; whole from a service that does not know the parameter."""
        if fields and not self._sends_all:
            try:
                return self._connection.json("GET", path, params={**params, "fields": ",".join(fields)})
            except ProblemError as error:
                if error.code != "bad_query" or [each.raw.get("parameter") for each in error.errors] != ["fields"]:
                    raise
                self._sends_all = True
        return self._connection.json("GET", path, params=params)

    def _stream(
        self, job_id: str, after: int, poll: float, patience: float, deadline: Deadline
    ) -> Iterable[results.Event]:
        path = _job(job_id, "events")
        return EventStream(self._connection, path, after=after, pause=poll, patience=patience, deadline=deadline)


def _dataset(dataset_id: str, *more: str) -> str:
    return "/".join(("/datasets", quote(dataset_id, safe=""), *more))


def _day(day: date | str | None) -> str | None:
    return day.isoformat() if isinstance(day, date) else day


def _worker(name: str, *more: str) -> str:
    return "/".join(("/workers", quote(name, safe=""), *more))


def _group(group: str, *more: str) -> str:
    return "/".join(("/groups", quote(group, safe=""), *more))


def _job(job_id: str, *rest: str) -> str:
    """The path of a job; quoted, so that no id can lead to another route."""
    return "/".join(("/jobs", quote(job_id, safe=""), *rest))


def _webhook(webhook_id: str, *rest: str) -> str:
    return "/".join(("/webhooks", quote(webhook_id, safe=""), *rest))


def _chunks(file: BinaryIO, name: str, size: int, on_progress: Progress | None) -> Iterator[bytes]:
    """A file's bytes, piece by piece, each reported once it was sent."""
    sent = 0
    while chunk := file.read(_UPLOAD_BYTES):
        yield chunk
        sent += len(chunk)
        if on_progress is not None:
            on_progress(name, sent, size)


def _given(**params: Any) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}
