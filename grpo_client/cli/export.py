"""`grpo export`: take a trained model away, merged or as GGUF, and push it to a hub.

Owns which job does the work and where its files go; the work itself is a worker's. Invariant: nothing is pushed that
was not downloaded whole, every SHA-256 checked.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from grpo_client import push as hub
from grpo_client.cli.output import EXIT_REFUSED, AsJson, CommandError, check_place, connected, print_json, say
from grpo_client.cli.progress import show_bytes
from grpo_client.cli.text import count
from grpo_client.cli.watch import EXIT_CODES, follow
from grpo_client.errors import PushError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from grpo_client.client import GrpoClient
    from grpo_client.results import ArtifactFile

Flag = Annotated[bool, Parameter(negative="")]
ADAPTER = "adapter"
EXPORT = "export"


def export(
    job_id: str,
    /,
    *,
    merge: Flag = False,
    gguf: Flag = False,
    type: str = "auto",  # noqa: A002 - the option's name
    step: int | None = None,
    to: Path | None = None,
    push: str | None = None,
    public: Flag = False,
    no_wait: Flag = False,
    json: AsJson = False,
) -> int:
    """Take a trained model away: merged into its base, as GGUF, or the adapter as it is.

    A worker merges and converts, and checks that the result answers as the adapter does. Exits 0 succeeded, 1 failed,
    2 refused, 3 cancelled.

    Parameters
    ----------
    merge
        The whole model as safetensors, for transformers and vLLM.
    gguf
        The whole model as one GGUF file, for llama.cpp and Ollama.
    type
        Of the weights: f16, bf16, or q8_0 with --gguf; default the base's 16 bits, or f16 with --gguf.
    step
        One of the job's checkpoints; default its best or last adapter.
    to
        Where to write; default a folder named after the job.
    push
        Upload to this repository, owner/name, of the Hugging Face hub with your own token; private unless --public.
    public
        Let everybody see the repository.
    no_wait
        Only submit the export; its files are below export/ once it has succeeded.
    """
    _check(merge=merge, gguf=gguf, step=step, push=push, no_wait=no_wait)
    repository = None if push is None else _hub(push)
    form = "merged" if merge else "gguf" if gguf else ADAPTER
    folder = to or Path(f"{Path(job_id).name}-{form}")
    check_place(folder)
    with connected() as client:
        source, wanted = job_id, ADAPTER
        if form != ADAPTER:
            job = client.export(job_id, step=step, format=form, type=type)
            if no_wait:
                print_json(job) if json else say(f"{job.id}: {job.status}")
                return 0
            ended = follow(client, job, as_json=json)
            if ended.status != "succeeded":
                if json:
                    print_json(ended)
                return EXIT_CODES[ended.status]
            source, wanted = ended.id, EXPORT
        files = _fetch(client, source, folder, [wanted], as_json=json)
    address = None if repository is None or push is None else _push(repository, folder / wanted, push, public=public)
    _tell(source, folder / wanted, files, address, as_json=json)
    return 0


def _check(*, merge: bool, gguf: bool, step: int | None, push: str | None, no_wait: bool) -> None:
    if merge and gguf:
        raise CommandError("Give --merge or --gguf, not both: each is a separate job.", EXIT_REFUSED)
    if not (merge or gguf or push):
        raise CommandError("Say what to do: --merge, --gguf, or --push owner/name for the adapter.", EXIT_REFUSED)
    if step is not None and not (merge or gguf):
        raise CommandError("--step needs --merge or --gguf: checkpoints have no model card.", EXIT_REFUSED)
    if no_wait and (push or not (merge or gguf)):
        raise CommandError("--no-wait is for --merge and --gguf without --push.", EXIT_REFUSED)


def _hub(name: str) -> HfApi:
    """The hub, asked for before a worker does anything in vain."""
    try:
        hub.check_repository(name)
        return hub.connect()
    except PushError as error:
        raise CommandError(str(error), EXIT_REFUSED) from error


def _fetch(
    client: GrpoClient, job_id: str, folder: Path, only: Collection[str], *, as_json: bool
) -> list[ArtifactFile]:
    with show_bytes(sys.stderr if as_json else sys.stdout, lines=not as_json) as on_bytes:
        try:
            return client.download(job_id, folder, on_bytes, only=only)
        except OSError as error:
            raise CommandError(f"{folder} cannot be written: {error.strerror or error}.") from error


def _push(api: HfApi, folder: Path, name: str, *, public: bool) -> str:
    try:
        return hub.push(api, folder, name, private=not public, message="Upload from grpo-jobs")
    except PushError as error:
        raise CommandError(f"{error} The files are in {folder}.") from error


def _tell(job_id: str, folder: Path, files: list[ArtifactFile], address: str | None, *, as_json: bool) -> None:
    if as_json:
        # Without the links, which give access to the files: output ends up in logs.
        names = ("path", "size", "sha256")
        listed = [{name: file[name] for name in names} for file in files]
        print_json({"job": job_id, "folder": str(folder), "files": listed, "pushed_to": address})
        return
    say(f"{count(len(files), 'file')} in {folder}; every SHA-256 is as announced.")
    if address:
        say(f"Pushed to {address}")
