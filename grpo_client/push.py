"""Uploads a folder to a model hub with its owner's own token, from the owner's machine.

Owns which repositories are written to; `huggingface_hub` uploads. Invariants: the token never reaches the service, and
a folder that is to be private is never uploaded to a public repository.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_client.errors import PushError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

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
        if private and not _is_private(hub.model_info(repository)):
            raise PushError(f"{repository} exists and is public. Name another one, or push with --public.")
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = " Check that your token may write there." if status in (401, 403) else ""
        raise PushError(f"The hub answered {status} for {repository}.{hint}") from error
    except (httpx.TransportError, OSError, RuntimeError) as error:  # the last one where a file's upload broke off
        raise PushError(f"The upload broke off ({type(error).__name__}: {error}). Push again to continue.") from error
    return f"{hub.endpoint}/{repository}"


def _is_private(info: Any) -> bool:
    return info.private is True
