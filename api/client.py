"""The Python client: the API's routes as methods, following a job to its end, and downloads that check every hash.

Results are the API's JSON as dictionaries; errors are those of `client_errors`, and `OSError` for files of yours. A
submission that was cut off is sent again with the Idempotency-Key it had, so it makes one job; nothing else that could
change a job is ever sent twice. Invariant: the API key goes to the API only, never to object storage.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar
from urllib.parse import quote

import httpx

from api.client_errors import ClientError, DownloadError, NotConfiguredError, ProblemError, UnreachableError
from api.download import Progress, save
from api.event_stream import read_events

__all__ = ["ClientError", "DownloadError", "GrpoClient", "NotConfiguredError", "ProblemError", "UnreachableError"]

Json = dict[str, Any]
JsonList = list[Json]

TERMINAL = frozenset({"succeeded", "failed", "cancelled"})
FORBIDDEN = 403
NO_CONTENT = 204
TOO_MANY = 429
GATEWAY_ERRORS = frozenset({502, 503, 504})
"""What a proxy says while the service behind it is away."""
RETRY_DELAYS = (0.5, 1.0, 2.0, 4.0, 4.0)
"""Seconds before each further attempt to submit; together longer than a dead attempt holds its key."""
_UPLOAD_BYTES = 256 * 1024
SILENCE_SECONDS = 45.0
"""A stream says something every 15 s; after so long without, its connection is dead."""

_Answer = TypeVar("_Answer")


class GrpoClient:
    """Talks to one service with one key; close it, or use it in a `with` block."""

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        timeout: float = 30.0,
        *,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        url = url or os.environ.get("GRPO_URL", "")
        key = key or os.environ.get("GRPO_API_KEY", "")
        if not url.startswith(("http://", "https://")):
            raise NotConfiguredError(
                "Where is the service? Set GRPO_URL to its address, such as http://127.0.0.1:8080"
                + (f"; {url!r} lacks http:// or https://." if url else ".")
            )
        if not key or not key.isascii() or not key.isprintable():
            raise NotConfiguredError("Who is asking? Set GRPO_API_KEY to a key that `grpo keys create` printed.")
        self._url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {key}", "Accept": "application/json"}
        self._api = httpx.Client(base_url=self._url, headers=headers, timeout=timeout, transport=transport)
        self._storage = httpx.Client(timeout=timeout, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._api.close()
        self._storage.close()

    def submit(self, spec: Json, *, idempotency_key: str | None = None) -> Json:
        """Submit a job; returns it as accepted.

        An answer that was lost is asked for again, under a key that makes it one job however often it is sent: a new
        one, unless you give your own to repeat a submission of an earlier process.
        """
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        for delay in RETRY_DELAYS:
            try:
                return self._call("POST", "/jobs", json=spec, headers=headers)
            except UnreachableError as error:
                if not error.may_pass:
                    raise
            except ProblemError as error:
                # The second: an attempt that was cut off here is still being served there.
                if error.code not in ("unavailable", "idempotency_in_progress"):
                    raise
            time.sleep(delay)
        return self._call("POST", "/jobs", json=spec, headers=headers)

    def dry_run(self, spec: Json) -> Json:
        """What a spec would become, with every warning; nothing is stored."""
        return self._call("POST", "/jobs", json=spec, params={"dry_run": "true"})

    def get(self, job_id: str, *, poll: float = 1.0, patience: float = 0.0) -> Json:
        """One job as it is now; a service that is away is asked again every `poll` seconds for `patience` seconds."""
        return self._patiently(lambda: self._call("GET", _job(job_id)), poll, patience)

    def list(
        self,
        *,
        limit: int = 20,
        cursor: str | None = None,
        status: str | None = None,
        metadata: dict[str, str] | None = None,
    ) -> Json:
        """A page of jobs, newest first; its `next_cursor` leads to the next."""
        pairs = {f"metadata[{key}]": value for key, value in (metadata or {}).items()}
        return self._call("GET", "/jobs", params={**pairs, **_given(limit=limit, cursor=cursor, status=status)})

    def cancel(self, job_id: str) -> Json:
        """Cancel a job; returns it, `cancelled` or `cancelling`."""
        return self._call("POST", _job(job_id, "cancel"))

    def pause(self, job_id: str) -> Json:
        """Pause a job; returns it, `paused` or `pausing`: asking again changes nothing."""
        return self._call("POST", _job(job_id, "pause"))

    def resume(self, job_id: str) -> Json:
        """Put a paused job back into the queue; returns it."""
        return self._call("POST", _job(job_id, "resume"))

    def delete(self, job_id: str) -> None:
        """Delete a job that has ended, with everything it left, for good."""
        self._gone(_job(job_id))

    def events(self, job_id: str, *, after: int = 0, limit: int = 100, types: Iterable[str] = ()) -> JsonList:
        """Up to `limit` events numbered above `after`."""
        params: Json = {"after": after, "limit": limit, "type": [*types]}
        return self._call("GET", _job(job_id, "events"), params=params)["data"]

    def metrics(self, job_id: str, *, after_step: int = 0) -> JsonList:
        """The metrics of each logged step above `after_step`."""
        return self._call("GET", _job(job_id, "metrics"), params={"after_step": after_step})["data"]

    def metrics_csv(self, job_id: str, *, after_step: int = 0) -> str:
        """The same as CSV with a header: one column a number, `rewards.NAME` and `seconds.PHASE` among them."""
        return self._text(_job(job_id, "metrics"), "text/csv", {"after_step": after_step, "format": "csv"})

    def rollouts(
        self,
        job_id: str,
        *,
        step: int | None = None,
        step_from: int | None = None,
        step_to: int | None = None,
        prompt: str | None = None,
        reward_lt: float | None = None,
        reward_gt: float | None = None,
        finish: str | None = None,
        order: str = "step",
        limit: int = 50,
        cursor: str | None = None,
    ) -> Json:
        """A page of a job's completions with their rewards, also while it runs; `next_cursor` leads to the next.

        `prompt` is a prompt_id: with `step` it gives one group, alone one prompt across steps. `order` is step, reward,
        advantage or length, with a minus in front turned round. `all_rollouts` follows the cursors.
        """
        params = _given(
            step=step,
            step_from=step_from,
            step_to=step_to,
            prompt=prompt,
            reward_lt=reward_lt,
            reward_gt=reward_gt,
            finish=finish,
            order=order,
            limit=limit,
            cursor=cursor,
        )
        return self._call("GET", _job(job_id, "rollouts"), params=params)

    def all_rollouts(self, job_id: str, *, limit: int = 500, **filters: Any) -> Iterator[Json]:
        """Every completion that the filters of `rollouts` let pass, asked for `limit` at a time."""
        page = self.rollouts(job_id, limit=limit, **filters)
        yield from page["data"]
        while page["next_cursor"]:
            page = self.rollouts(job_id, limit=limit, **{**filters, "cursor": page["next_cursor"]})
            yield from page["data"]

    def rollout_steps(self, job_id: str) -> JsonList:
        """The steps whose completions can be read, each with its prompts and the spread of its rewards."""
        return self._call("GET", _job(job_id, "rollouts", "steps"))["data"]

    def checkpoints(self, job_id: str) -> JsonList:
        """The checkpoints a job has saved so far, their files with short-lived links."""
        return self._call("GET", _job(job_id, "checkpoints"))["data"]

    def artifacts(self, job_id: str) -> Json:
        """The job's files in `data`, each with a short-lived link, and whether the list is `complete`."""
        return self._call("GET", _job(job_id, "artifacts"))

    def service_metrics(self) -> str:
        """The service's own metrics in Prometheus' text format; the key needs the scope metrics:read."""
        return self._text("/metrics", "text/plain")

    def rewards(self) -> JsonList:
        """The reward functions."""
        return self._call("GET", "/rewards")["data"]

    def upload_dataset(self, path: str | Path, *, name: str | None = None, on_progress: Progress | None = None) -> Json:
        """Upload a JSONL file; returns the data set, whose `id` a spec can name."""
        path = Path(path)
        size = path.stat().st_size
        with path.open("rb") as file:
            return self._call(
                "POST",
                "/datasets",
                params=_given(name=name),
                content=_chunks(file, path.name, size, on_progress),
                headers={"Content-Type": "application/x-ndjson", "Content-Length": str(size)},
            )

    def datasets(self, *, limit: int = 20, cursor: str | None = None) -> Json:
        """A page of data sets, newest first; its `next_cursor` leads to the next."""
        return self._call("GET", "/datasets", params=_given(limit=limit, cursor=cursor))

    def delete_dataset(self, dataset_id: str) -> None:
        """Delete an upload that no unfinished job names, for good."""
        self._gone(f"/datasets/{quote(dataset_id, safe='')}")

    def stream(self, job_id: str, *, after: int = 0, poll: float = 1.0, patience: float = 60.0) -> Iterator[Json]:
        """Every event numbered above `after`, those to come too, each once; ends when the job has ended.

        A connection that breaks is made again where it left off. A service that is away for less than `patience`
        seconds, as for a restart, is waited for.
        """
        heard = time.monotonic()
        while True:
            try:
                for event in self._stream_once(job_id, after):
                    heard = time.monotonic()
                    if event is None:
                        continue
                    after = event["seq"]
                    yield event
                    if event["type"] == "status" and event["data"].get("status") in TERMINAL:
                        return
            except _ReadToTheEnd:
                return
            except (UnreachableError, ProblemError) as error:
                if not _is_passing(error) or time.monotonic() - heard > patience:
                    raise
            time.sleep(poll)

    def wait(
        self,
        job_id: str,
        on_event: Callable[[Json], None] | None = None,
        poll: float = 1.0,
        *,
        patience: float = 60.0,
    ) -> Json:
        """Follow a job until it has ended, telling `on_event` of each event once; returns the job.

        `poll` is the pause before a broken connection is made again, `patience` as for `stream`.
        """
        for event in self.stream(job_id, poll=poll, patience=patience):
            if on_event is not None:
                on_event(event)
        return self.get(job_id, poll=poll, patience=patience)

    def download(
        self, job_id: str, folder: str | Path, on_progress: Progress | None = None, *, only: Collection[str] = ()
    ) -> JsonList:
        """Save a job's files below `folder`, each checked against its announced hash; returns what was announced.

        Files that are already there and right are not fetched again. `only` names files or folders of the job, such
        as `adapter`, or patterns such as `rollouts/*`; none is all.
        """
        listing = self.artifacts(job_id)
        known = [artifact["path"] for artifact in listing["data"]]
        listing["data"] = [artifact for artifact in listing["data"] if _is_wanted(artifact["path"], only)]
        if known and not listing["data"]:
            raise DownloadError(f"Job {job_id} has no {', '.join(only)}; it left {', '.join(_tops(known))}.")
        if not listing["data"]:
            reason = "left no files" if listing["complete"] else "has not ended: its files come then"
            raise DownloadError(f"Job {job_id} {reason}.")
        files = {artifact["path"]: artifact for artifact in listing["data"]}
        for path in files:
            try:
                self._save(files[path], Path(folder), on_progress)
            except httpx.HTTPStatusError as error:
                if error.response.status_code != FORBIDDEN:
                    raise DownloadError(f"{path}: storage answered {error.response.status_code}.") from error
                # The link has expired, as links do during long downloads: ask for new ones, once.
                files = {artifact["path"]: artifact for artifact in self.artifacts(job_id)["data"]}
                self._save_or_say_why(files[path], Path(folder), on_progress)
        return listing["data"]

    def download_file(self, job_id: str, path: str, target: str | Path, on_progress: Progress | None = None) -> Json:
        """Save one of a job's files as `target`, checked against its announced hash; returns what was announced."""
        listing, target = self.artifacts(job_id), Path(target)
        for artifact in listing["data"]:
            if artifact["path"] == path:
                self._save_or_say_why({**artifact, "path": target.name}, target.parent, on_progress)
                return artifact
        reason = "left none" if listing["complete"] else "has not ended: it may come then"
        raise DownloadError(f"There is no {path} of job {job_id}, which {reason}.")

    def _save(self, artifact: Json, folder: Path, on_progress: Progress | None) -> None:
        try:
            save(self._storage, artifact, folder, on_progress)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise UnreachableError(f"{artifact['path']}: object storage cannot be reached ({_why(error)}).") from error

    def _save_or_say_why(self, artifact: Json, folder: Path, on_progress: Progress | None) -> None:
        try:
            self._save(artifact, folder, on_progress)
        except httpx.HTTPStatusError as error:
            raise DownloadError(f"{artifact['path']}: storage answered {error.response.status_code}.") from error

    def _stream_once(self, job_id: str, after: int) -> Iterator[Json | None]:
        """One connection's events, and None for each sign of life; ends when the service closes it."""
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        timeout = httpx.Timeout(self._api.timeout.connect, read=SILENCE_SECONDS)
        with self._reaching(), self._api.stream("GET", _job(job_id, "events"), headers=headers, timeout=timeout) as r:
            if r.status_code == NO_CONTENT:
                raise _ReadToTheEnd
            if not r.headers.get("content-type", "").startswith("text/event-stream"):
                r.read()
                self._answer(r)
                raise self._not_this_api(r)
            yield None
            try:
                yield from read_events(r.iter_bytes())
            except ValueError as error:
                raise self._not_this_api(r) from error

    def _patiently(self, ask: Callable[[], _Answer], poll: float, patience: float) -> _Answer:
        """Ask a question that changes nothing again and again, until it is answered or patience ends."""
        deadline = time.monotonic() + patience
        while True:
            try:
                return ask()
            except (UnreachableError, ProblemError) as error:
                if not _is_passing(error) or time.monotonic() >= deadline:
                    raise
            time.sleep(poll)

    def _call(self, method: str, path: str, **request: Any) -> Json:
        with self._reaching():
            response = self._api.request(method, path, **request)
        return self._answer(response)

    def _gone(self, path: str) -> None:
        with self._reaching():
            response = self._api.delete(path)
        if response.status_code != NO_CONTENT:
            self._answer(response)
            raise self._not_this_api(response)

    def _text(self, path: str, media_type: str, params: Json | None = None) -> str:
        with self._reaching():
            response = self._api.get(path, params=params, headers={"Accept": media_type})
        if response.is_success and response.headers.get("content-type", "").startswith(media_type):
            return response.text
        self._answer(response)
        raise self._not_this_api(response)

    @contextmanager
    def _reaching(self) -> Generator[None]:
        try:
            yield
        except (httpx.TransportError, httpx.InvalidURL) as error:
            message = f"The service at {self._url} cannot be reached ({_why(error)}). {_reachable(error)}"
            raise UnreachableError(message, may_pass=isinstance(error, httpx.TransportError)) from error

    def _answer(self, response: httpx.Response) -> Json:
        body = _object_of(response)
        if response.is_success and body is not None:
            return body
        if body is None or not response.is_error:
            raise self._not_this_api(response)
        raise ProblemError(response.status_code, body)

    def _not_this_api(self, response: httpx.Response) -> UnreachableError:
        message = (
            f"{self._url} answered {response.status_code} with something that is not this API. "
            "GRPO_URL must be the API's address, without a path."
        )
        return UnreachableError(message, may_pass=response.status_code in GATEWAY_ERRORS)


class _ReadToTheEnd(Exception):
    """The job has ended and every event of it was read."""


def _is_passing(error: UnreachableError | ProblemError) -> bool:
    """Whether the same question may be answered later: it is no refusal."""
    if isinstance(error, UnreachableError):
        return error.may_pass
    return error.status >= 500 or error.status == TOO_MANY


def _job(job_id: str, *rest: str) -> str:
    """The path of a job; quoted, so that no id can lead to another route."""
    return "/".join(("/jobs", quote(job_id, safe=""), *rest))


def _chunks(file: BinaryIO, name: str, size: int, on_progress: Progress | None) -> Iterator[bytes]:
    """A file's bytes, piece by piece, telling of each once it was taken."""
    sent = 0
    while chunk := file.read(_UPLOAD_BYTES):
        yield chunk
        sent += len(chunk)
        if on_progress is not None:
            on_progress(name, sent, size)


def _is_wanted(path: str, only: Collection[str]) -> bool:
    return not only or any(fnmatchcase(path, name) or path.startswith(f"{name.rstrip('/')}/") for name in only)


def _tops(paths: Iterable[str]) -> list[str]:
    """Files, and folders in place of what is in them."""
    return list(dict.fromkeys(path.partition("/")[0] + ("/" if "/" in path else "") for path in paths))


def _given(**params: Any) -> Json:
    return {name: value for name, value in params.items() if value is not None}


def _object_of(response: httpx.Response) -> Json | None:
    try:
        body = response.json()
    except ValueError:
        return None
    return body if isinstance(body, dict) else None


def _reachable(error: Exception) -> str:
    """What to look at when nobody answered."""
    if "WRONG_VERSION_NUMBER" in str(error):
        return "It speaks no TLS: set GRPO_URL to http:// instead of https://."
    return "Is it running, as after `grpo up`, and is GRPO_URL its address?"


def _why(error: Exception) -> str:
    return str(error) or type(error).__name__
