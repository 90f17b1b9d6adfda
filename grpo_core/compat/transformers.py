"""Private uses of transformers and its trackers: the callback with a tracker's name, and TensorBoard's writer."""

from __future__ import annotations

from typing import Any, Final

from grpo_core.compat import Use, require

READ_IN: Final = "5.17.0"
_FIND: Final = "get_reporting_integration_callbacks"
USES: Final = (Use(name=f"transformers.integrations.integration_utils:{_FIND}", positional=1),)


def tracker_callback(name: str) -> Any:
    """A new callback of the tracker with this name in `report_to`. Raises `LibraryChanged` or the tracker's error."""
    require("transformers", READ_IN, USES)
    from transformers.integrations import integration_utils

    [callback_type] = getattr(integration_utils, _FIND)([name])
    return callback_type()


def flush(callback: Any) -> None:
    """Make TensorBoard's callback write what it holds. Otherwise the last two minutes are lost if the run ends here."""
    write = getattr(getattr(callback, "tb_writer", None), "flush", None)
    if write is not None:
        write()
