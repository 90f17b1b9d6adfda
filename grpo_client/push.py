"""Uploads a folder to a model hub with its owner's own token, from the owner's machine.

Owns which repositories are written to; `huggingface_hub` uploads. Invariants: the token never reaches the service, a
folder that is to be private is never uploaded to a public repository, and no repository gets two models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_client.errors import PushError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

WEIGHTS: Final = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def check_repository(name: str) -> None:
    """Raise `PushError` unless a name is `owner/name` as hubs take them."""
    if not NAME.fullmatch(name) or ".." in name or "--" in name or name.endswith((".git", ".", "-")):
        raise PushError(f"{name!r} is no name of a repository. Use owner/name, such as ann/my-model.")


def connect() -> HfApi:
    """The hub with the token of this machine. Raises `PushError` without the library or a token."""
    try:
        from huggingface_hub import HfApi, get_token
    except ImportError as error:
        raise PushError("Pushing needs huggingface-hub: pip install 'grpo-client[hub]'.") from error
    if not get_token():
        raise PushError("The hub needs your token. Set HF_TOKEN to one that may write, or run hf auth login.")
    return HfApi()


def push(hub: HfApi, folder: Path, repository: str, *, private: bool, message: str) -> str:
    """Upload the folder as a model repository, which is made if need be; returns its address.

    Raises `PushError`. May be repeated: files that are there already are not sent again.
    """
    check_repository(repository)
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    try:
        hub.create_repo(repository, visibility="private" if private else "public", exist_ok=True)
        info = hub.model_info(repository)
        if private and info.private is not True:
            raise PushError(f"{repository} exists and is public. Name another one, or push with --public.")
        _require_no_other_model(repository, folder, info)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = " Check that your token may write there." if status in (401, 403) else ""
        said = f" ({error.server_message.rstrip('.')})" if error.server_message else ""
        raise PushError(f"The hub answered {status} for {repository}{said}.{hint}") from error
    except ValueError as error:  # what the hub does not take, such as fields of the card
        why = " ".join(str(error).split())
        raise PushError(f"The hub does not take the files for {repository}: {why}") from error
    except (httpx.TransportError, OSError, RuntimeError) as error:  # the last one where a file's upload broke off
        raise PushError(f"The upload broke off ({type(error).__name__}: {error}). Push again to continue.") from error
    return f"{hub.endpoint}/{repository}"


def _require_no_other_model(repository: str, folder: Path, info: Any) -> None:
    """Raise `PushError` if weights would stay beside those of the folder, where programs load one or the other.

    GGUF files of several types may share a repository: each is loaded by its name.
    """
    pushed = {file.name for file in folder.iterdir()}
    there = {file.rfilename for file in info.siblings or ()} - pushed
    only_gguf = all(name.endswith(".gguf") for name in _weights(pushed))
    left = sorted(name for name in _weights(there) if not (only_gguf and name.endswith(".gguf")))
    if left:
        raise PushError(
            f"{repository} has another model, {left[0]}, which this push would leave there. Name another repository, "
            "or delete that file on the hub."
        )


def _weights(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.endswith(WEIGHTS)]
