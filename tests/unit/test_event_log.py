"""Events that were stored are read back, whatever a model has written into them."""

from __future__ import annotations

from typing import Any, cast

from grpo_core import strict_json
from jobs.store.bucket import ObjectStore
from jobs.store.event_log import event_files, events_name, read_events


class Bucket:
    """As much of a store as is read here."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects = objects
        self.read: list[str] = []

    def get(self, key: str) -> bytes | None:
        self.read.append(key)
        return self.objects.get(key)


def event(seq: int, **data: Any) -> dict[str, Any]:
    return {"seq": seq, "type": "sample", "data": data}


def stored(*files: list[dict[str, Any]]) -> Bucket:
    return Bucket(
        {
            "e1/" + events_name(events[0]["seq"], events[-1]["seq"]): "".join(
                f"{strict_json.dumps(each)}\n" for each in events
            ).encode()
            for events in files
        }
    )


def read(bucket: Bucket, after: int = 0) -> list[dict[str, Any]]:
    return list(read_events(cast("ObjectStore", bucket), event_files(bucket.objects), after=after))


def test_completions_may_hold_any_text() -> None:
    events = [
        event(1, completion="a\0b"),
        event(2, completion="line\u2028line\x85\r\nend"),
        event(3, completion="一😀"),
    ]
    assert read(stored(events)) == events


def test_only_the_files_of_a_page_are_read() -> None:
    bucket = stored([event(1), event(2)], [event(3), event(4)], [event(5)])
    assert [each["seq"] for each in read(bucket, after=3)] == [4, 5]
    assert bucket.read == ["e1/" + events_name(3, 4), "e1/" + events_name(5, 5)]


def test_what_two_runs_have_stored_comes_once() -> None:
    bucket = stored([event(1), event(2), event(3)], [event(3), event(4)])
    assert [each["seq"] for each in read(bucket)] == [1, 2, 3, 4]
