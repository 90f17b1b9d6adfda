"""The keys of all objects in the bucket: one function for each kind, so that no other module spells out a key.

Invariant: keys are made from the service's own ids and quoted names of owners, never from text that a client sent.
"""

from __future__ import annotations

from urllib.parse import quote, unquote

JOBS = "jobs/"
KEYS = "keys/"
KEY_FACTS = "key-facts/"
DATASETS = "datasets/"
DATASETS_OF = "datasets-of/"
PROBE = "probe/"
ERASED = "erased/"
USAGE = "usage/"
WEBHOOKS = "webhooks/"
SENTINEL = "sentinel.json"


def folder(job_id: str) -> str:
    """Prefix of everything about one job."""
    return f"{JOBS}{job_id}/"


def priority(job_id: str) -> str:
    """The priority that its owner has set since the submission."""
    return f"{JOBS}{job_id}/priority.json"


def job(job_id: str) -> str:
    """The request, written once before the client gets an answer."""
    return f"{JOBS}{job_id}/job.json"


def epochs(job_id: str) -> str:
    """Prefix of the epoch tickets."""
    return f"{JOBS}{job_id}/epochs/"


def epoch(job_id: str, number: int) -> str:
    """The ticket of one run of the job, written once: the worker that writes it owns the number."""
    return f"{epochs(job_id)}{number}.json"


def controls(job_id: str) -> str:
    """Prefix of the commands."""
    return f"{JOBS}{job_id}/control/"


def control(job_id: str, number: int) -> str:
    """One command to cancel, pause or resume, written once before the client gets an answer."""
    return f"{controls(job_id)}{number:06d}.json"


def outcome(job_id: str) -> str:
    """How the job ended, written once; it is authoritative."""
    return f"{JOBS}{job_id}/outcome.json"


def record(job_id: str) -> str:
    """The record of an ended job when it left Valkey."""
    return f"{JOBS}{job_id}/record.json"


def run(job_id: str, number: int) -> str:
    """Prefix of all objects that one run writes."""
    return f"{JOBS}{job_id}/e{number}/"


def base(job_id: str, number: int) -> str:
    """What a run takes over from earlier runs, written when it starts."""
    return f"{run(job_id, number)}base.json"


def commits(job_id: str, number: int) -> str:
    """Prefix of a run's commits."""
    return f"{run(job_id, number)}commits/"


def commit(job_id: str, number: int, step: int) -> str:
    """The valid objects at a checkpoint, written once all of them are in the bucket."""
    return f"{commits(job_id, number)}step-{step:06d}.json"


def rejected(job_id: str, number: int) -> str:
    """The commit from which a run should resume and that it could not read: later runs skip it."""
    return f"{run(job_id, number)}rejected.json"


def manifest(job_id: str, number: int) -> str:
    """Key, SHA-256 and size of every valid object of the job at this epoch."""
    return f"{JOBS}{job_id}/manifest-e{number}.json"


def api_key(key_id: str) -> str:
    """The record of an API key, with its hash and without the key."""
    return f"{KEYS}{key_id}.json"


def key_facts(key_id: str) -> str:
    """What lists show of an API key beside its record: its first characters, and which key created it."""
    return f"{KEY_FACTS}{key_id}.json"


def dataset_folder(dataset_id: str) -> str:
    """Prefix of all objects of an uploaded data set."""
    return f"{DATASETS}{dataset_id}/"


def dataset(dataset_id: str) -> str:
    """The description of an uploaded data set."""
    return f"{DATASETS}{dataset_id}/dataset.json"


def dataset_rows(dataset_id: str) -> str:
    """The rows of an uploaded data set."""
    return f"{DATASETS}{dataset_id}/data.jsonl"


def dataset_shape(dataset_id: str) -> str:
    """The types of an uploaded data set's columns."""
    return f"{DATASETS}{dataset_id}/shape.json"


def dataset_of(owner: str, dataset_id: str) -> str:
    """An empty object that lists an upload for its owner."""
    return f"{datasets_of(owner)}{dataset_id}"


def datasets_of(owner: str) -> str:
    """Prefix of the ids of an owner's uploads."""
    return f"{DATASETS_OF}{quote(owner, safe='')}/"


def erased(name: str) -> str:
    """The marker of a job's or data set's deletion, written once before anything is deleted."""
    return f"{ERASED}{name}.json"


def usages(owner: str) -> str:
    """Prefix of an owner's usage."""
    return f"{USAGE}{quote(owner, safe='')}/"


def usage(owner: str, day: str) -> str:
    """GPU time of an owner's runs that started on a day."""
    return f"{usages(owner)}{day}.json"


def webhooks_of(owner: str) -> str:
    """Prefix of an owner's webhooks."""
    return f"{WEBHOOKS}{quote(owner, safe='')}/"


def webhook_folder(owner: str, webhook_id: str) -> str:
    """Prefix of all objects of a webhook."""
    return f"{webhooks_of(owner)}{webhook_id}/"


def webhook(owner: str, webhook_id: str) -> str:
    """A webhook with its secret, sealed if the operator has set a key."""
    return f"{webhook_folder(owner, webhook_id)}webhook.json"


def sent_of(owner: str, webhook_id: str) -> str:
    """Prefix of the marks of a webhook's deliveries."""
    return f"{webhook_folder(owner, webhook_id)}sent/"


def sent(owner: str, webhook_id: str, event_id: str) -> str:
    """The mark that the end of a job was reported to a webhook, or given up."""
    return f"{sent_of(owner, webhook_id)}{event_id}"


def unquoted(name: str) -> str:
    """Return an owner's name from its quoted part in a key."""
    return unquote(name)
