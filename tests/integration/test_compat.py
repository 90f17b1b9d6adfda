"""The training libraries that are installed have what the `compat` modules use of them."""

from __future__ import annotations

import pytest

from grpo_core.compat import require


def test_the_installed_libraries_have_what_is_used() -> None:
    pytest.importorskip("trl")
    from grpo_core.compat import huggingface_hub, transformers, trl

    trl.check()
    require("transformers", transformers.READ_IN, transformers.USES)
    require("huggingface_hub", huggingface_hub.READ_IN, huggingface_hub.USES)
