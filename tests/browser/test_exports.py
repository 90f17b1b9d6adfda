"""A trained model leaves the page: its adapter as one archive, and a dialog that has a worker export it."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable

import pytest

from tests.browser.conftest import OWNER, Stack, Visitor

pytestmark = [pytest.mark.browser]
Visit = Callable[..., Visitor]


def test_the_adapter_is_one_archive(visit: Visit, stack: Stack) -> None:
    job = stack.ended("good", "taken away", 12)
    visitor = visit()
    visitor.log_in(f"/jobs/{job}")
    with visitor.page.expect_download() as started:
        visitor.page.get_by_role("link", name="Download adapter").click()
    assert started.value.suggested_filename == f"{job}-adapter.tar"
    stored = {file.path: file.sha256 for file in stack.service.artifacts(job, OWNER)}
    with tarfile.open(started.value.path()) as archive:
        found = {file.name: hashlib.sha256(archive.extractfile(file).read()).hexdigest() for file in archive}  # type: ignore[union-attr]
    assert found == {path: sha256 for path, sha256 in stored.items() if path.startswith("adapter/")}


def test_an_export_is_a_job(visit: Visit, stack: Stack) -> None:
    job = stack.ended("good", "taken away", 12)
    visitor = visit()
    page = visitor.page
    visitor.log_in(f"/jobs/{job}")
    page.get_by_role("button", name="Export").click()
    dialog = page.get_by_role("dialog", name="Export the trained model")
    offered = dialog.get_by_label("Weights").get_by_role("option")
    assert [one.get_attribute("value") for one in offered.all()] == ["auto", "bf16", "f16"]
    dialog.get_by_label("Form").select_option("gguf")
    assert [one.get_attribute("value") for one in offered.all()] == ["f16", "bf16", "q8_0"]
    dialog.get_by_label("Weights").select_option("q8_0")
    dialog.get_by_role("button", name="Export").click()
    page.wait_for_url(lambda address: "#/jobs/" in address and job not in address)
    visitor.settled()
    made = page.url.rpartition("/")[2]
    spec = stack.service.get(made, OWNER).spec
    assert (spec["kind"], spec["export"]) == ("export", {"job": job, "step": None, "format": "gguf", "type": "q8_0"})
    assert page.get_by_role("link", name="Download adapter").count() == 0
