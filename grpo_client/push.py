"""Uploads a folder to a model hub with its owner's own token, from the owner's machine.

Owns which repositories are written to; `huggingface_hub` uploads. Invariants: the token never reaches the service, a
folder that is to be private is never uploaded to a public repository, and no repository gets two models.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from grpo_client.errors import PushError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Form = Literal["adapter", "merged", "gguf"]
PATTERNS: Final[Mapping[Form, str]] = {
    "adapter": "adapter_model.safetensors",
    "merged": "model*.safetensors",
    "gguf": "*.gguf",
}
"""The weights of each form."""
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


def check_access(hub: HfApi, repository: str, form: Form, *, private: bool) -> None:
    """Raise `PushError` for what can be known before there are files: the token, its owner, and what is there."""
    check_repository(repository)
    from huggingface_hub.errors import HfHubHTTPError

    with _explained(repository):
        try:
            _require_owner(hub.whoami(), repository)
            _require_place(repository, hub.model_info(repository), PATTERNS[form], private=private)
        except HfHubHTTPError as error:
            if error.response.status_code != HTTPStatus.NOT_FOUND:  # it will be made
                raise


def push(hub: HfApi, folder: Path, repository: str, *, private: bool, message: str) -> str:
    """Upload the folder as a model repository, which is made if need be; returns its address.

    Raises `PushError`. May be repeated: files that are there already are not sent again.
    """
    check_repository(repository)
    pushed = [file.name for file in folder.iterdir()]
    # GGUF files of several types may share a repository: each is loaded by its name.
    replaced = ["*.gguf"] if all(name.endswith(".gguf") for name in _weights(pushed)) else pushed
    with _explained(repository):
        hub.create_repo(repository, visibility="private" if private else "public", exist_ok=True)
        _require_place(repository, hub.model_info(repository), *replaced, private=private)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    return f"{hub.endpoint}/{repository}"


@contextmanager
def _explained(repository: str) -> Generator[None]:
    """Turn what the library raises into a `PushError`."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = " Check that your token may write there." if status in (401, 403) else ""
        said = f" ({error.server_message.rstrip('.')})" if error.server_message else ""
        raise PushError(f"The hub answered {status} for {repository}{said}.{hint}") from error
    except ValueError as error:  # what the hub does not take, such as fields of the card
        why = " ".join(str(error).split())
        raise PushError(f"The hub does not take the files for {repository}: {why}") from error
    except (httpx.TransportError, OSError, RuntimeError) as error:  # the last one where a file's upload broke off
        raise PushError(f"The hub broke off ({type(error).__name__}: {error}). Push again to continue.") from error


def _require_owner(who: Mapping[str, Any], repository: str) -> None:
    owner = repository.partition("/")[0]
    owners = [str(who.get("name")), *(str(org.get("name")) for org in who.get("orgs") or ())]
    if owner not in owners:
        raise PushError(f"Your token is of {owners[0]}, and {repository} would be {owner}'s. Use {owners[0]}/NAME.")


def _require_place(repository: str, info: Any, *replaced: str, private: bool) -> None:
    """Raise `PushError` if a private folder would become public, or if weights would stay beside those that are
    pushed, where programs load one or the other; `replaced` are patterns of names."""
    if private and info.private is not True:
        raise PushError(f"{repository} exists and is public. Name another one, or push with --public.")
    there = _weights(file.rfilename for file in info.siblings or ())
    left = sorted(name for name in there if not any(fnmatchcase(name, pattern) for pattern in replaced))
    if left:
        raise PushError(
            f"{repository} has another model, {left[0]}, which this push would leave there. Name another repository, "
            "or delete that file on the hub."
        )


def _weights(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.endswith(WEIGHTS)]
