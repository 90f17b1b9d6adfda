"""The names of everything in the bucket: one function an object, so that no key is spelt out anywhere else.

Invariant: keys are made from ids this service made itself and from owners' quoted names, never from text a client sent.
"""

from __future__ import annotations

from urllib.parse import quote

JOBS = "jobs/"
KEYS = "keys/"
DATASETS = "datasets/"
DATASETS_OF = "datasets-of/"
PROBE = "probe/"
ERASED = "erased/"


def folder(job_id: str) -> str:
    """Prefix of everything about one job."""
    return f"{JOBS}{job_id}/"


def job(job_id: str) -> str:
    """What was asked for, put once before the client hears of the job."""
    return f"{JOBS}{job_id}/job.json"


def epochs(job_id: str) -> str:
    """Prefix of the epoch tickets."""
    return f"{JOBS}{job_id}/epochs/"


def epoch(job_id: str, number: int) -> str:
    """The ticket of one run of the job, put once: whoever puts it owns the number."""
    return f"{epochs(job_id)}{number}.json"


def controls(job_id: str) -> str:
    """Prefix of the control orders."""
    return f"{JOBS}{job_id}/control/"


def control(job_id: str, number: int) -> str:
    """One order to cancel, pause or resume, put once before the client hears that it was taken."""
    return f"{controls(job_id)}{number:06d}.json"


def outcome(job_id: str) -> str:
    """How the job ended, put once: the strongest truth there is about it."""
    return f"{JOBS}{job_id}/outcome.json"


def run(job_id: str, number: int) -> str:
    """Prefix of all that one epoch writes."""
    return f"{JOBS}{job_id}/e{number}/"


def base(job_id: str, number: int) -> str:
    """What stays valid of earlier runs, written when a run begins."""
    return f"{run(job_id, number)}base.json"


def commits(job_id: str, number: int) -> str:
    """Prefix of a run's commits."""
    return f"{run(job_id, number)}commits/"


def commit(job_id: str, number: int, step: int) -> str:
    """What is valid as of a checkpoint, written once the checkpoint and all up to it are in the bucket."""
    return f"{commits(job_id, number)}step-{step:06d}.json"


def rejected(job_id: str, number: int) -> str:
    """The commit a run was started from and could not read: later runs pass it over."""
    return f"{run(job_id, number)}rejected.json"


def manifest(job_id: str, number: int) -> str:
    """Key, SHA-256 and size of every valid object of the job as of this epoch."""
    return f"{JOBS}{job_id}/manifest-e{number}.json"


def api_key(key_id: str) -> str:
    """One API key's record, with its hash and never the key."""
    return f"{KEYS}{key_id}.json"


def dataset(dataset_id: str) -> str:
    """The description of an uploaded data set."""
    return f"{DATASETS}{dataset_id}/dataset.json"


def dataset_rows(dataset_id: str) -> str:
    """The rows of an uploaded data set."""
    return f"{DATASETS}{dataset_id}/data.jsonl"


def dataset_of(owner: str, dataset_id: str) -> str:
    """That an owner has an upload of this id."""
    return f"{datasets_of(owner)}{dataset_id}"


def datasets_of(owner: str) -> str:
    """Prefix of the ids of an owner's uploads."""
    return f"{DATASETS_OF}{quote(owner, safe='')}/"


def erased(name: str) -> str:
    """That a job or a data set of this id was deleted, put once before anything of it goes."""
    return f"{ERASED}{name}.json"
