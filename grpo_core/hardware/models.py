"""Where a base model comes from and how it is held in memory.

Owns the look-up (`$GRPO_MODEL_DIR`, then the hub), what may be downloaded (safetensors and text, never code), and the
choice of precision on this machine. Reads only files and numbers; engines load the weights.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from grpo_core import hub
from grpo_core.errors import JobFailure
from grpo_core.estimates import WEIGHTS_SHARE, resolve_precision, weight_bytes
from grpo_core.reasons import FailureClass, FailureCode
from grpo_core.spec.sections import ModelSection

MODEL_DIR_VARIABLE: Final = "GRPO_MODEL_DIR"
"""Folder of models, as `name` or `owner/name`, that is searched before the hub."""

# No *.bin and no *.py: neither pickles nor code ever leave the hub. Card and licence are for exports.
_HUB_FILES: Final = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "README.md", "LICENSE*", "NOTICE*"]
_NOT_OF_A_BASE: Final = ["adapter_config.json", "*/adapter_config.json"]
"""Names another model, which transformers would load in place of this one."""
_MAX_HEADER: Final = 100 * 2**20


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on this machine's disk."""

    name: str
    revision: str | None
    """The commit, for a model of the hub."""
    source: Literal["folder", "hub"]
    path: Path
    parameters: int

    @property
    def is_public(self) -> bool:
        """Whether others find it by its name: at the hub, or in a folder that is named after its repository there."""
        return self.source == "hub" or "/" in self.name


@dataclass(frozen=True, slots=True)
class Hardware:
    """What an engine found on this machine."""

    gpus: int = 0
    gpu_memory_bytes: int = 0
    """Of the smallest GPU."""
    bf16: bool = False
    gpu_free_bytes: int = 0
    """Memory of that GPU that no other process uses."""


@dataclass(frozen=True, slots=True)
class Precision:
    """How weights are held and computed with, and why."""

    requested: Literal["auto", "4bit", "8bit", "16bit"]
    weights: Literal["fp32", "16bit", "8bit", "4bit"]
    dtype: Literal["float32", "bfloat16", "float16"]
    reason: str

    def as_dict(self) -> dict[str, str]:
        """The JSON form."""
        return asdict(self)


def find_model(section: ModelSection, warn: hub.Warn) -> ModelFiles:
    """The files of the model a spec names, fetched if need be.

    Raises a `user_config` failure, or `infra` where the hub stays away.
    """
    folder = local_folder(section.name)
    if folder is not None:
        return ModelFiles(section.name, None, "folder", folder, _count_checked(folder, section.name))
    otherwise = f"put the model's folder into {_model_dir()}"
    path = hub.patiently(lambda: _fetch(section), warn, what=f"the model {_called(section)}", otherwise=otherwise)
    _require_own_files(path, section.name)
    return ModelFiles(section.name, path.name, "hub", path, _count_checked(path, section.name))


def local_folder(name: str) -> Path | None:
    """The folder of `name` in the model directory, if both exist; refuses one that leads out of it."""
    setting = os.environ.get(MODEL_DIR_VARIABLE)
    if not setting:
        return None
    root = Path(setting).resolve()
    folder = (root / name).resolve()
    if not folder.is_relative_to(root):
        raise _bad_model(
            FailureCode.MODEL_OUTSIDE_FOLDER, f"{name!r} leads out of the model directory.", "Name a model inside it."
        )
    return folder if (folder / "config.json").is_file() else None


def count_parameters(folder: Path) -> int:
    """Parameters of a model, from the headers of its safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError("no *.safetensors file")
    return sum(math.prod(entry["shape"]) for file in files for entry in _header(file).values())


def choose_precision(section: ModelSection, parameters: int, hardware: Hardware, *, has_4bit: bool = True) -> Precision:
    """How to load a model on this machine: the rule is in `estimates`, the reason is for the report.

    `has_4bit`: whether the engine holds weights in 4 bits.
    """
    memory = hardware.gpu_memory_bytes
    weights = resolve_precision(
        section.precision,
        device="cuda" if hardware.gpus else "cpu",
        parameters=parameters,
        gpu_memory_bytes=memory or None,
    )
    if weights == "fp32":
        return Precision(section.precision, weights, "float32", "a CPU trains in 32-bit")
    dtype = "bfloat16" if hardware.bf16 else "float16"
    if weights == "4bit" and section.precision == "auto" and not has_4bit:
        return Precision("auto", "16bit", dtype, "the engine has no weights in 4 bits")
    if section.precision != "auto":
        return Precision(section.precision, weights, dtype, "as requested")
    needed = weight_bytes(parameters, "16bit")
    reason = (
        f"16-bit weights take {needed / 1e9:.1f} GB, {'at most' if weights == '16bit' else 'more than'} "
        f"{WEIGHTS_SHARE:.0%} of the card's {memory / 1e9:.1f} GB"
    )
    return Precision(section.precision, weights, dtype, reason)


def _fetch(section: ModelSection) -> Path:
    """Download a model's snapshot, or take it from the hub's cache."""
    import httpx
    from huggingface_hub import errors

    where = _called(section)
    try:
        return _download(section)
    except errors.GatedRepoError as error:
        raise _gated(section) from error
    except errors.RevisionNotFoundError as error:
        raise _bad_model(
            FailureCode.REVISION_NOT_FOUND,
            f"The model {where} does not exist.",
            "Check model.revision; null is the default branch.",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise _bad_model(
            FailureCode.MODEL_NOT_FOUND,
            f"The hub has no model {where}, or it is private.",
            f"Check model.name. {hub.ASK_FOR_TOKEN} Put your own models into {_model_dir()}.",
        ) from error
    except (OSError, errors.RevisionResolutionError, httpx.TransportError) as error:
        is_away = hub.is_away(error)
        if isinstance(error, OSError) and error.errno is not None and not is_away:
            raise  # this machine's fault, such as a full disk
        # One that is turned off on purpose will be so at the next try.
        raise JobFailure(
            FailureCode.HUB_UNREACHABLE,
            f"The model {where} is not on this worker, and the Hugging Face hub could not be reached.",
            hint=f"Put the model's folder into {_model_dir()}, or give the worker access to the hub.",
            failure_class=None if is_away else FailureClass.USER_CONFIG,
        ) from error
    except ValueError as error:  # the hub's own opinion on names
        raise _bad_model(FailureCode.BAD_NAME, f"{section.name!r} is not a model name.", "Use owner/name.") from error


def _download(section: ModelSection) -> Path:
    """What the worker's token opens is kept apart: from the common cache it would be open to every job."""
    from huggingface_hub import constants, snapshot_download

    hub.watch_requests()
    token = hub.token_for(section.name)
    apart = Path(constants.HF_HUB_CACHE) / "by-token"
    if token is False:
        _require_open(section)
    elif constants.HF_HUB_OFFLINE and not (apart / f"models--{section.name.replace('/', '--')}").is_dir():
        apart = Path(constants.HF_HUB_CACHE)
    path = snapshot_download(
        section.name,
        revision=section.revision,
        allow_patterns=_HUB_FILES,
        ignore_patterns=_NOT_OF_A_BASE,
        token=token,
        cache_dir=apart if token else None,
    )
    return Path(path)


def _require_open(section: ModelSection) -> None:
    """Refuse a gated model to a job without the token, also where an earlier release left its files in the cache."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return  # the operator has filled the cache, and turned the hub off
    api = HfApi(endpoint=constants.ENDPOINT, token=False)
    try:
        info = api.model_info(section.name, revision=section.revision, timeout=hub.TIMEOUT_SECONDS)
    except Exception as error:
        if hub.is_away(error):
            return  # the download says so too, unless the files are here already
        raise
    if info.gated:
        raise _gated(section)


def _gated(section: ModelSection) -> JobFailure:
    hint = f"{hub.ASK_FOR_TOKEN} Its terms have to be accepted first."
    return _bad_model(FailureCode.MODEL_GATED, f"The model {_called(section)} is gated.", hint)


def _require_own_files(folder: Path, name: str) -> None:
    """Refuse a model whose weights or configuration are elsewhere: what it names could be anything on this machine."""
    index = folder / "model.safetensors.index.json"
    try:
        listed = json.loads(index.read_bytes())["weight_map"].values() if index.is_file() else ()
        own = all("/" not in file and "\\" not in file and file != ".." for file in set(listed))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        own = False
    if not own or not (folder / "config.json").is_file():
        raise _bad_model(
            FailureCode.MODEL_UNREADABLE,
            f"{name!r} has no config.json with weights.",
            "Use a whole model: config.json, and *.safetensors files beside it.",
        )


def _called(section: ModelSection) -> str:
    return f"{section.name!r}" + (f" at revision {section.revision!r}" if section.revision else "")


def _model_dir() -> str:
    """How to call the model directory in advice, without telling users the machine's paths."""
    return f"the worker's ${MODEL_DIR_VARIABLE}" + ("" if os.environ.get(MODEL_DIR_VARIABLE) else " (not set now)")


def _count_checked(folder: Path, name: str) -> int:
    try:
        return count_parameters(folder)
    except PermissionError as error:
        raise _bad_model(
            FailureCode.MODEL_UNREADABLE,
            f"A file of the weights of {name!r} may not be read by training processes.",
            "Make the model's files readable by everyone on the worker's machine: chmod -R a+rX FOLDER.",
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise _bad_model(
            FailureCode.MODEL_UNREADABLE,
            f"The weights of {name!r} cannot be read as safetensors ({type(error).__name__}).",
            "Use a model with whole *.safetensors files; convert older weights with save_pretrained.",
        ) from error


def _header(file: Path) -> dict[str, dict[str, Any]]:
    with file.open("rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        if size > _MAX_HEADER:
            raise ValueError("header too large")
        header: dict[str, dict[str, Any]] = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    return header


def _bad_model(code: FailureCode, message: str, hint: str) -> JobFailure:
    return JobFailure(code, message, hint=hint)
