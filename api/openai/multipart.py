"""Reads a file that is uploaded as multipart/form-data, as OpenAI's SDK sends it.

Owns the form: its fields and their limits; `grpo_core.datasets` checks the rows. Invariant: memory is bounded, and a
file goes to the disk as it arrives.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, Final

from litestar import Request
from litestar.concurrency import sync_to_thread
from multipart import MultipartError, MultipartSegment, PushMultipartParser

from api.bodies import batches, check_encoding
from api.openai.errors import refusal, refusals
from api.problems import ApiError
from api.schemas import FieldProblem
from api.settings import ApiSettings
from api.uploads import Uploads
from grpo_core.datasets import DatasetError, DatasetSummary, DatasetTooLargeError, JsonlChecker
from grpo_core.spec import Problem
from grpo_core.strict_json import parts_of

PURPOSES: Final = ("fine-tune", "evals", "user_data")
MAX_PARTS: Final = 16
MAX_FIELD_BYTES: Final = 1024
MAX_NAME: Final = 100
_FORM_BYTES: Final = 64 * 1024
"""What the form may add to the size of its file."""
_BOUNDARY: Final = re.compile(
    r"multipart/form-data\s*;(?:.*;)?\s*boundary=(?:\"([^\"]{1,70})\"|([^\s;\"]{1,70}))", re.I
)


@dataclass(frozen=True, kw_only=True)
class ReceivedFile:
    """A checked file of rows, which is gone when the request ends."""

    path: Path
    summary: DatasetSummary
    filename: str
    purpose: str


async def receive_file(request: Request[Any, Any, Any]) -> AsyncIterator[ReceivedFile]:
    """Dependency: the form with `file` and `purpose`; kept for as long as the request lasts."""
    check_encoding(request)
    boundary = _boundary(request)
    settings: ApiSettings = request.app.state.settings
    uploads: Uploads = request.app.state.uploads
    size = request.headers.get("content-length", "")
    announced = int(size) if size.isdecimal() and len(size) < 20 else None
    with (
        uploads.begin(request.user.owner, announced) as place,
        TemporaryDirectory(prefix="grpo-upload-") as folder,
    ):
        path = Path(folder) / "dataset.jsonl"
        checker = JsonlChecker(max_rows=settings.max_dataset_rows, max_bytes=settings.max_dataset_bytes)
        with path.open("wb") as file:
            form = _Form(boundary, file, checker)
            async for batch in batches(request.stream()):
                await sync_to_thread(form.feed, batch)
                place.take(len(batch))
        yield await sync_to_thread(form.finish, path)


def body_limit(max_dataset_bytes: int) -> int:
    """The largest body whose file may be accepted."""
    return max_dataset_bytes + _FORM_BYTES


def _boundary(request: Request[Any, Any, Any]) -> str:
    found = _BOUNDARY.match(request.headers.get("content-type", ""))
    if found is None:
        detail = "The body is not multipart/form-data with a boundary. Send the fields file and purpose as a form."
        raise ApiError("unsupported_media_type", detail)
    return found[1] or found[2]


class _Form:
    """The form as far as it has arrived."""

    def __init__(self, boundary: str, file: BinaryIO, checker: JsonlChecker) -> None:
        self._parser = PushMultipartParser(boundary, max_segment_count=MAX_PARTS)
        self._file, self._checker = file, checker
        self._fields: dict[str, bytes] = {}
        self._filename: str | None = None
        self._name = ""
        """Of the field that is arriving."""

    def feed(self, batch: bytes) -> None:
        """Read the next bytes."""
        try:
            for found in self._parser.parse(batch):
                self._take(found)
        except MultipartError as error:
            raise ApiError("bad_request", "The form cannot be read. Send it as multipart/form-data.") from error
        except DatasetError as error:
            raise _of_file(error) from error

    def _take(self, found: MultipartSegment | bytearray | bytes | None) -> None:
        if isinstance(found, MultipartSegment):
            self._begin(found)
        elif found is not None:
            self._add(self._name, bytes(found))

    def _begin(self, part: MultipartSegment) -> None:
        self._name = part.name or ""
        if self._name != "file":
            self._fields.setdefault(self._name, b"")
        elif self._filename is not None:
            raise refusal("file", "invalid_value", "is given more than once", "Send one file.")
        else:
            self._filename = part.filename or ""

    def _add(self, name: str, chunk: bytes) -> None:
        if name == "file":
            self._checker.feed(chunk)
            self._file.write(chunk)
            return
        self._fields[name] += chunk
        if len(self._fields[name]) > MAX_FIELD_BYTES:
            raise refusal(name[:80], "string_above_max_length", f"has more than {MAX_FIELD_BYTES} bytes", "Shorten it.")

    def finish(self, path: Path) -> ReceivedFile:
        """The whole form, checked."""
        try:
            self._parser.close()
        except MultipartError as error:
            raise ApiError("bad_request", "The form ends before its last boundary. Send it again.") from error
        if self._filename is None:
            raise refusal("file", "missing_required_parameter", "is required", "Send a JSONL file as the field file.")
        purpose = _purpose(self._fields)
        try:
            summary = self._checker.finish()
        except DatasetError as error:
            raise _of_file(error) from error
        return ReceivedFile(path=path, summary=summary, filename=_plain_name(self._filename), purpose=purpose)


def _purpose(fields: dict[str, bytes]) -> str:
    given = fields.pop("purpose", None)
    if fields:
        name = next(iter(fields)).partition("[")[0][:80]
        raise refusal(name, "unsupported_parameter", "is not offered here", "Leave it out.")
    if given is None:
        raise refusal("purpose", "missing_required_parameter", "is required", "Give fine-tune.")
    purpose = given.decode("utf-8", "replace")
    if purpose not in PURPOSES:
        remedy = f"Use one of {', '.join(PURPOSES)}."
        raise refusal("purpose", "invalid_value", f"is {purpose[:80]!r}", remedy)
    return purpose


def _plain_name(name: str) -> str:
    """A file's name as a data set's label: one line, and its end where it is long."""
    plain = re.sub(r"[\x00-\x1f\x7f]", "", name.replace("\\", "/").rpartition("/")[2]).strip()
    return plain[-MAX_NAME:] or "file.jsonl"


def _of_file(error: DatasetError) -> ApiError:
    """Problems of the rows as those of the field `file`."""
    problems = [
        FieldProblem(
            pointer="", parameter="file", code=one.code, detail=f"file: {_where(one)}{one.detail}", remedy=one.remedy
        )
        for one in error.problems
    ]
    if isinstance(error, DatasetTooLargeError):
        return ApiError("body_too_large", "The file is too large.", errors=problems, headers={"Connection": "close"})
    return refusals(problems)


def _where(problem: Problem) -> str:
    parts = parts_of(problem.pointer)
    return f"line {parts[1]}: " if parts[:1] == ["lines"] else ""
