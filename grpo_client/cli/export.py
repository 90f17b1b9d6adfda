"""`grpo export`: take a trained model away, merged or as GGUF, and push it to a hub.

Owns which job does the work and where its files go; the work itself is a worker's. Invariant: nothing is pushed that
was not downloaded whole, every SHA-256 checked.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, cast

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
    from grpo_client.results import ArtifactFile, JobDetail

Flag = Annotated[bool, Parameter(negative="")]
ADAPTER: Final = "adapter"
EXPORT: Final = "export"


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
        Without --merge or --gguf: the adapter, or what an export job has made.
    public
        Let everybody see the repository.
    no_wait
        Only submit the export; its files are below export/ once it has succeeded.
    """
    _check(merge=merge, gguf=gguf, step=step, push=push, no_wait=no_wait)
    form: hub.Form = "merged" if merge else "gguf" if gguf else ADAPTER
    with connected() as client:
        source, wanted = job_id, ADAPTER
        made = None if merge or gguf else _made_by(client.get(job_id))
        if made is not None:
            form, wanted = made, EXPORT
        folder = to or Path(f"{Path(job_id).name}-{form}")
        check_place(folder)
        repository = None if push is None else _hub(push, form, public=public)
        if merge or gguf:
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
    address = None
    if repository is not None and push is not None:
        address = _push(repository, folder / wanted, push, source, public=public)
    _tell(source, folder / wanted, files, address, as_json=json)
    return 0


def _check(*, merge: bool, gguf: bool, step: int | None, push: str | None, no_wait: bool) -> None:
    if merge and gguf:
        raise CommandError("Give --merge or --gguf, not both: each is a separate job.", EXIT_REFUSED)
    if not (merge or gguf or push):
        raise CommandError("Say what to do: --merge, --gguf, or --push owner/name for what the job has.", EXIT_REFUSED)
    if step is not None and not (merge or gguf):
        raise CommandError("--step needs --merge or --gguf: checkpoints have no model card.", EXIT_REFUSED)
    if no_wait and (push or not (merge or gguf)):
        raise CommandError("--no-wait is for --merge and --gguf without --push.", EXIT_REFUSED)


def _made_by(job: JobDetail) -> hub.Form | None:
    """The form of what an export job has made, so that its files are fetched and no worker does it again."""
    spec = job.spec
    if spec.get("kind") != "export":
        return None
    if job.status != "succeeded":
        raise CommandError(f"{job.id} is {job.status} and has made nothing yet. Follow it: grpo watch {job.id}")
    return cast("hub.Form", spec["export"]["format"])


def _hub(name: str, form: hub.Form, *, public: bool) -> HfApi:
    """The hub, asked before a worker does anything in vain."""
    try:
        hub.check_repository(name)
        api = hub.connect()
        hub.check_access(api, name, form, private=not public)
        return api
    except PushError as error:
        raise CommandError(str(error), EXIT_REFUSED) from error


def _fetch(
    client: GrpoClient, job_id: str, folder: Path, only: Collection[str], *, as_json: bool
) -> list[ArtifactFile]:
    with show_bytes(sys.stderr if as_json else sys.stdout, lines=not as_json) as on_bytes:
        try:
            return client.download(job_id, folder, on_bytes, only=only)
        except OSError as error:
            again = " ".join(["grpo download", job_id, "FOLDER", *(f"--only {name}" for name in only)])
            message = f"{folder} cannot be written: {error.strerror or error}. The service keeps the files: {again}"
            raise CommandError(message) from error


def _push(api: HfApi, folder: Path, name: str, job_id: str, *, public: bool) -> str:
    try:
        return hub.push(api, folder, name, private=not public, message="Upload from grpo-jobs")
    except PushError as error:
        again = f"grpo export {job_id} --push {name} --to {folder.parent}{' --public' if public else ''}"
        raise CommandError(f"{error} The files are in {folder}; try again with: {again}") from error


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
