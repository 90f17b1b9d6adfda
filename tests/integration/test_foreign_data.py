"""Data sets of other people's making: what they may hold is read, and nothing in them leads anywhere or takes much."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from grpo_core.datasets import DATASET_DIR_VARIABLE, DatasetError, Row, load_rows, tables
from grpo_core.datasets import parquet as parquet_module
from grpo_core.datasets.card import Subset
from grpo_core.datasets.files import matches, splits_of
from grpo_core.datasets.parquet import require_bounded
from grpo_core.egress import HOSTS_VARIABLE
from grpo_core.spec import DataSection
from grpo_core.training.classify_error import failure_of
from tests.hub_server import Recorder, Repo, Server, hub_with, point_at, serve

pa = pytest.importorskip("pyarrow", reason="it comes with the training extras")
pq = pytest.importorskip("pyarrow.parquet")

NAME = "owner/data"
ROWS = [("1+1", 2), ("1+2", 3)]
WANTED = [Row(0, "1+1", "2"), Row(1, "1+2", "3")]


def jsonl(rows: Sequence[tuple[Any, Any]] = ROWS) -> bytes:
    return b"".join(json.dumps({"question": q, "answer": a}).encode() + b"\n" for q, a in rows)


def parquet(columns: Mapping[str, Any] | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    given = columns or {"question": [q for q, _ in ROWS], "answer": [a for _, a in ROWS]}
    table = given if isinstance(given, pa.Table) else pa.table(dict(given))
    pq.write_table(table, file, **options)
    return file.getvalue()


def card(text: str) -> bytes:
    return f"---\n{text}\n---\n# About\n".encode()


@pytest.fixture
def internal() -> Iterator[Server]:
    """A server inside the worker's network, which a data set has no business with."""
    with serve(Recorder) as server:
        yield server


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATASET_DIR_VARIABLE, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _seconds: None)
    monkeypatch.setattr("grpo_core.hub.WAIT_SECONDS", ())


Load = Callable[..., list[Row]]


@pytest.fixture(params=["hub", "folder"])
def load(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Reads a data set with the given files, once from the hub and once from a folder."""

    def section(fields: Mapping[str, Any]) -> DataSection:
        names = {"question_column": "question", "answer_column": "answer"}
        return DataSection.model_validate({"dataset": NAME, **names, **fields})

    def from_hub(files: Mapping[str, bytes], **fields: Any) -> list[Row]:
        with hub_with({NAME: Repo(files)}) as server:
            point_at(monkeypatch, server.url)
            return load_rows(section(fields), Path("unused"))

    def from_folder(files: Mapping[str, bytes], **fields: Any) -> list[Row]:
        for path, content in files.items():
            file = tmp_path / "shelf" / NAME / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        return load_rows(section(fields), Path("unused"), dataset_dir=tmp_path / "shelf")

    return from_hub if request.param == "hub" else from_folder


def refusal(load: Load, files: Mapping[str, bytes], **fields: Any) -> DatasetError:
    with pytest.raises(DatasetError) as caught:
        load(files, **fields)
    assert all(problem.remedy for problem in caught.value.problems)
    return caught.value


# What was accepted still is


@pytest.mark.parametrize(
    "file",
    [
        pytest.param({"train.jsonl": jsonl()}, id="jsonl"),
        pytest.param({"train.jsonl": b"\xef\xbb\xbf\n" + jsonl().replace(b"\n", b"\r\n\r\n")}, id="jsonl, odd ends"),
        pytest.param({"rows.ndjson": jsonl().rstrip()}, id="ndjson, no last line end"),
        pytest.param({"train.json": jsonl()}, id="lines in a .json"),
        pytest.param({"train.json": json.dumps(
            [{"question": q, "answer": a} for q, a in ROWS], indent=1).encode()}, id="one JSON list"),
        pytest.param({"train.jsonl.gz": gzip.compress(jsonl()[:20]) + gzip.compress(jsonl()[20:])}, id="gz"),
        pytest.param({"train.jsonl.bz2": bz2.compress(jsonl())}, id="bz2"),
        pytest.param({"train.jsonl.xz": lzma.compress(jsonl()[:30]) + lzma.compress(jsonl()[30:])}, id="xz"),
        pytest.param({"train.jsonl.zst": bytes(pa.compress(jsonl(), "zstd"))}, id="zst"),
        pytest.param({"train.csv": b"question,answer,note\n1+1,2.0,\n\"1+2\",3.0,\"a\nb\"\n"}, id="csv"),
        pytest.param({"train.csv.gz": gzip.compress(b"answer,question\r\n2,1+1\r\n3,1+2\r\n")}, id="csv.gz"),
        pytest.param({"train.tsv": b"question\tanswer\n1+1\t2\n1+2\t3\n"}, id="tsv"),
        pytest.param({"data/train-00000-of-00001.parquet": parquet()}, id="parquet"),
        pytest.param({"data/train-00000-of-00001.parquet": parquet(compression="zstd", data_page_version="2.0",
                                                                   use_dictionary=False)}, id="parquet, version 2"),
        pytest.param({"default/train/0000.parquet": parquet()}, id="as the hub converts to parquet"),
        pytest.param({"train.jsonl": jsonl(ROWS[:1]), "train_more.jsonl": jsonl(ROWS[1:]),
                      "test.jsonl": jsonl([("t", 1)]), "LICENSE": b"MIT", "config.json": b"{}"}, id="names"),
        pytest.param({"x/dev/rows.csv": b"a", "y/training/rows.jsonl": jsonl(), "z/eval/rows.jsonl": jsonl()},
                     id="names of folders"),
    ],
)  # fmt: skip
def test_data_files_of_every_documented_form_are_read(load: Load, file: dict[str, bytes]) -> None:
    assert load(file) == WANTED


def test_the_layout_of_gsm8k_with_its_subsets(load: Load) -> None:
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n"
        f"  - split: test\n    path: {name}/test-*\n"
        for name in ("main", "socratic")
    )
    infos = "dataset_info:\n- config_name: main\n  features:\n  - name: question\n    dtype: string\n"
    files = {
        "README.md": card(f"license: mit\n{infos}configs:\n{configs}"),
        "main/train-00000-of-00001.parquet": parquet(),
        "main/test-00000-of-00001.parquet": parquet({"question": ["t"], "answer": ["1"]}),
        "socratic/train-00000-of-00001.parquet": parquet({"question": ["s"], "answer": ["0"]}),
    }
    assert load(files, subset="main") == WANTED
    assert load(files, subset="main", split="test") == [Row(0, "t", "1")]
    assert load(files, subset="socratic") == [Row(0, "s", "0")]
    problem = refusal(load, files).problems[0]
    assert (problem.code, problem.pointer) == ("no_such_subset", "/data/subset")
    assert "main, socratic" in problem.remedy
    assert refusal(load, files, subset="other").code == "no_such_subset"
    assert refusal(load, files, subset="socratic", split="test").problems[0].remedy == "Its splits are: train."


def test_a_default_subset_a_folder_and_a_separator_of_the_card(load: Load) -> None:
    files = {
        "README.md": card(
            "configs:\n- config_name: a\n  data_files: [a.csv]\n- config_name: b\n  default: true\n"
            "  data_dir: deep/er\n  data_files: '**/part?.csv'\n  sep: ';'"
        ),
        "a.csv": b"question,answer\na,1\n",
        "deep/er/x/part1.csv": b"question;answer\n1+1;2\n",
        "deep/er/x/part2.csv": b"question;answer\n1+2;3\n",
        "deep/er/x/part10.csv": b"question;answer\nno;0\n",
    }
    assert load(files) == WANTED
    assert load(files, subset="a") == [Row(0, "a", "1")]


def test_columns_that_are_not_asked_for_may_hold_anything(load: Load) -> None:
    image = {"bytes": b"\x89PNG", "path": "http://192.0.2.1/x.png"}
    columns = {"question": ["1+1", "1+2"], "answer": [2, 3], "image": [image, None], "tags": [["a"], []]}
    described = card(
        "dataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: answer\n    dtype: int64"
    )
    assert load({"README.md": described, "train.parquet": parquet(columns)}) == WANTED


def test_a_csv_columns_numbers_are_numbers_and_its_gaps_are_gaps(load: Load) -> None:
    table = b"question,answer\na,7.0\nb,\nc,1_000\nd,nan\n"
    assert load({"train.csv": table}) == [Row(0, "a", "7.0"), Row(2, "c", "1_000")]
    assert load({"train.csv": table.replace(b"1_000", b"1e3")}) == [Row(0, "a", "7"), Row(2, "c", "1000")]


@pytest.mark.parametrize(
    ("path", "pattern", "fits"),
    [
        ("a.jsonl", "*.jsonl", True),
        ("x/a.jsonl", "*.jsonl", False),
        ("x/a.jsonl", "**/*.jsonl", True),
        ("a.jsonl", "**/*.jsonl", True),
        ("x/y/a.jsonl", "x/**", True),
        ("x/a-3.csv", "x/a-[0-9].csv", True),
        ("x/y/z/a.csv", "x/**/z/*", True),
        ("x/y/z/b/a.csv", "x/**/z/*", False),
        ("a" * 400, "*a*a*a*a*a*a*a*a*a*a*b", False),
        ("/".join("a" * 200), "/".join(["**"] * 100) + "/b", False),
    ],
)
def test_patterns(path: str, pattern: str, fits: bool) -> None:
    assert matches(path, pattern) is fits


def test_archives_and_hidden_files_are_no_data() -> None:
    paths = ["a.zip", "a.tar", "a.jsonl.zip", "a.arrow", ".git/x.jsonl", "__MACOSX/y.csv", "../z.csv", "b.jsonl"]
    assert [file.path for file in splits_of(paths, Subset())["train"]] == ["b.jsonl"]


# A data set leads nowhere

OUTSIDE = (
    "{internal}/rows.jsonl",
    "zip://rows.jsonl::{internal}/a.zip",
    "gzip://x::zip://y::{internal}/z",
    "simplecache::{internal}/rows.jsonl",
    "file:///etc/passwd",
    "/etc/passwd",
    "../../secret/rows.jsonl",
    "data/../../other.jsonl",
    "~/secret.jsonl",
    "hf://datasets/other/private/rows.jsonl",
    "hf://datasets/owner/data/train.jsonl",
    "s3://bucket/key.jsonl",
    "data\\..\\x",
    "x" * 600,
)


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize(
    "form",
    ["data_files: {0}", "data_files: [{0}]", "data_files:\n  - split: train\n    path: [train.jsonl, {0}]",
     "data_dir: {0}", "data_files:\n    train: {0}"],
)  # fmt: skip
def test_a_description_that_points_outside_is_refused_alike_and_asks_nobody(
    load: Load, internal: Server, path: str, form: str
) -> None:
    described = "configs:\n- config_name: default\n  " + form.format(json.dumps(path.format(internal=internal.url)))
    refused = refusal(load, {"README.md": card(described), "train.jsonl": jsonl()})
    assert str(refused) == (
        "/data/dataset the card of owner/data names data files outside the data set. "
        "Use a data set that holds its own files."
    )
    assert internal.asked == []


@pytest.mark.parametrize("feature", [
    "dtype: image", "dtype: audio", "dtype: video", "dtype: pdf", "dtype: nifti", "dtype: binary",
    "dtype:\n      image:\n        decode: true", "list: image", "sequence: audio", "sequence:\n      dtype: image",
    "struct:\n    - name: deep\n      list:\n      - name: er\n        dtype: image", "dtype: 7", "what: ever",
    "dtype:\n      array2_d:\n        shape: [9999999, 9999999]\n        dtype: string",
])  # fmt: skip
def test_a_column_that_is_declared_as_more_than_text_is_not_decoded(load: Load, internal: Server, feature: str) -> None:
    described = f"dataset_info:\n- config_name: default\n  features:\n  - name: question\n    {feature}"
    cell = {"path": f"{internal.url}/cell.png", "bytes": None}
    files = {"README.md": card(described), "train.jsonl": jsonl([(cell, 1), (f"{internal.url}/text.png", 2)])}
    problem = refusal(load, files).problems[0]
    assert (problem.code, problem.pointer) == ("unsupported_column", "/data/question_column")
    assert internal.asked == []


@pytest.mark.parametrize(
    "feature", ["dtype: string", "dtype: int64", "dtype: bool", "dtype:\n      class_label:\n        names: {'0': a}"]
)
def test_text_numbers_and_booleans_are_read_as_declared(load: Load, feature: str) -> None:
    described = f"dataset_info:\n- config_name: default\n  features:\n  - name: question\n    {feature}"
    assert load({"README.md": card(described), "train.jsonl": jsonl()}) == WANTED


def test_a_cell_that_names_a_file_is_no_text(load: Load, internal: Server) -> None:
    cells = [({"path": f"{internal.url}/a.png", "bytes": None}, 1), ({"src": "/etc/passwd"}, 2), ("1+1", 2)]
    assert load({"train.jsonl": jsonl(cells)}) == [Row(2, "1+1", "2")]
    assert internal.asked == []


@pytest.mark.parametrize(
    ("kind", "embedded"),
    [
        pytest.param(pa.struct([("bytes", pa.binary()), ("path", pa.string())]), None, id="a struct of bytes"),
        pytest.param(pa.binary(), None, id="bytes"),
        pytest.param(pa.list_(pa.string()), None, id="a list"),
        pytest.param(pa.timestamp("s"), None, id="a time"),
        pytest.param(pa.string(), {"_type": "Image"}, id="text that is said to be an image"),
        pytest.param(pa.string(), {"_type": "Sequence", "feature": {"_type": "Audio"}}, id="a list of sounds"),
        pytest.param(pa.string(), {"_type": "Value", "dtype": "binary"}, id="text that is said to be bytes"),
    ],
)
def test_a_parquet_file_cannot_make_a_column_more_than_text(
    load: Load, internal: Server, kind: Any, embedded: Any
) -> None:
    table = pa.table({"question": pa.array([None], kind), "answer": [1]})
    if embedded is not None:
        table = pa.table({"question": [f"{internal.url}/a.png"], "answer": [1]})
        info = {"info": {"features": {"question": embedded, "answer": {"dtype": "int64", "_type": "Value"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    assert refusal(load, {"train.parquet": parquet(table)}).code == "unsupported_column"
    assert internal.asked == []


def test_programs_and_archives_of_a_data_set_are_not_opened(load: Load, internal: Server) -> None:
    script = f"import urllib.request; urllib.request.urlopen('{internal.url}')".encode()
    infos = json.dumps({"default": {"download_checksums": {f"{internal.url}/x": {}}, "features": {}}}).encode()
    archives = {"README.md": b"", "train.zip": b"PK\x03\x04", "train.tar": b"", "dataset_infos.json": infos}
    assert refusal(load, archives).code == "no_data_files"
    assert refusal(load, {"data.py": script, "train.jsonl": jsonl()}).code == "dataset_script"
    assert internal.asked == []


def test_a_link_in_a_folder_leads_no_further_than_the_folder_of_data_sets(tmp_path: Path) -> None:
    shelf, secret = tmp_path / "shelf", tmp_path / "secret.jsonl"
    secret.write_bytes(jsonl())
    (shelf / NAME).mkdir(parents=True)
    (shelf / NAME / "train.jsonl").symlink_to(secret)
    columns = {"question_column": "question", "answer_column": "answer"}
    data = DataSection.model_validate({"dataset": NAME, **columns})
    with pytest.raises(DatasetError) as caught:
        load_rows(data, Path("unused"), dataset_dir=shelf)
    assert caught.value.code == "foreign_files"
    # As the hub's library lays a download out, which an operator may link to as a whole.
    download = tmp_path / "cache" / "datasets--owner--data"
    (download / "snapshots" / "a").mkdir(parents=True)
    (download / "blobs").mkdir()
    (download / "blobs" / "b").write_bytes(jsonl())
    (download / "snapshots" / "a" / "train.jsonl").symlink_to("../../blobs/b")
    (shelf / "owner" / "linked").symlink_to(download / "snapshots" / "a")
    assert load_rows(data.model_copy(update={"dataset": "owner/linked"}), Path(), dataset_dir=shelf) == WANTED


@pytest.mark.parametrize("path", ["train.jsonl", "README.md", "train.parquet"])
@pytest.mark.parametrize(
    "target", ["{internal}/x", "http://127.0.0.1:9/x", "http://no-such-host.invalid/x", "file:///x"]
)
def test_a_redirect_to_a_host_that_is_not_the_hubs_is_refused_alike(
    internal: Server, monkeypatch: pytest.MonkeyPatch, path: str, target: str
) -> None:
    files = {path: jsonl(), "README.md": b"# About\n"}
    repo = Repo(files, redirects={path: target.format(internal=internal.url)})
    with hub_with({NAME: repo}) as server:
        point_at(monkeypatch, server.url)
        with pytest.raises(DatasetError) as caught:
            load_rows(DataSection.model_validate({"dataset": NAME}), Path("unused"))
    report = failure_of(caught.value).report
    assert internal.asked == []
    assert (report.failure_class, report.code) == ("dataset", "egress_refused")
    assert report.message == "/data/dataset owner/data leads to a host that the training process may not connect to"
    assert HOSTS_VARIABLE in report.hint


def test_a_redirect_to_a_host_that_the_operator_listed_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cdn(Recorder):
        def answer(self, path: str) -> None:
            self.respond(jsonl())

    with serve(Cdn) as cdn:
        monkeypatch.setenv(HOSTS_VARIABLE, cdn.url.removeprefix("http://"))
        repo = Repo({"train.jsonl": jsonl()}, redirects={"train.jsonl": f"{cdn.url}/blob"})
        with hub_with({NAME: repo}) as server:
            point_at(monkeypatch, server.url)
            columns = {"question_column": "question", "answer_column": "answer"}
            assert load_rows(DataSection.model_validate({"dataset": NAME, **columns}), Path()) == WANTED
    assert {path for _, path in cdn.asked} == {"/blob"}


# A data set takes no more than its rows are worth


def refused_within(megabytes: float, load: Load, files: Mapping[str, bytes]) -> DatasetError:
    tracemalloc.start()
    try:
        refused = refusal(load, files)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < megabytes * 1e6
    return refused


@pytest.fixture
def smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds scaled down, so that files of some megabytes show what those of gigabytes do."""
    monkeypatch.setattr(tables, "MAX_RECORD_BYTES", 1_000_000)
    monkeypatch.setattr(tables, "MAX_DECODED_BYTES", 20_000_000)
    monkeypatch.setattr(parquet_module, "MAX_PAGE_BYTES", 1_000_000)


LONG = b"a" * 30_000_000


@pytest.mark.parametrize(
    "file",
    [
        pytest.param({"train.jsonl.gz": gzip.compress(b'{"question": "' + LONG + b'", "answer": 1}')}, id="one line"),
        pytest.param({"train.jsonl.gz": gzip.compress(b"\n" * 30_000_000)}, id="blank lines"),
        pytest.param({"train.jsonl.xz": lzma.compress(b'{"question": "' + LONG)}, id="xz"),
        pytest.param({"train.jsonl.bz2": bz2.compress(b'{"question": "' + LONG)}, id="bz2"),
        pytest.param({"train.jsonl.zst": bytes(pa.compress(b'{"a": "' + LONG, "zstd"))}, id="zst"),
        pytest.param({"train.json.gz": gzip.compress(b'[{"question": "' + LONG)}, id="a list"),
        pytest.param({"train.csv.gz": gzip.compress(b'question,answer\n"' + LONG)}, id="a field"),
        pytest.param(
            {"train.csv.gz": gzip.compress(b'question,answer\n"' + b"a\n" * 9_000_000)}, id="a field of lines"
        ),
        pytest.param({"train.csv.gz": gzip.compress(b"," * 9_000_000)}, id="a header"),
    ],
)
def test_a_small_file_that_grows_is_read_no_further_than_a_record(
    load: Load, smaller: None, file: dict[str, bytes]
) -> None:
    assert len(next(iter(file.values()))) < 100_000
    assert refused_within(40, load, file).code == "too_large"


@pytest.mark.parametrize(
    "body",
    [b'{"question": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", b"[" * 100_000, b'{"a":' * 100_000, b"[[[[[[1]]]]]]"],
)
def test_json_that_is_nested_deeply_is_unreadable(load: Load, body: bytes) -> None:
    assert refusal(load, {"train.jsonl": body}).code == "unreadable"


@pytest.mark.parametrize(
    "yaml", ["[" * 100_000, "- " * 100_000, "{a: " * 60_000, "a: &a [*a]\nb: [", "x: !!python/x 1"]
)
def test_a_card_that_is_nested_deeply_or_broken_is_unreadable(load: Load, yaml: str) -> None:
    assert refusal(load, {"README.md": card(yaml), "train.jsonl": jsonl()}).code == "unreadable"


def test_an_xz_file_cannot_ask_for_gigabytes_to_be_read(load: Load) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1024**3}]
    small = lzma.LZMACompressor(filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 4096}])
    raw = bytearray(small.compress(jsonl()) + small.flush())
    # The size of the dictionary is one byte of the block's header, which has a checksum of its own.
    import zlib

    asked = lzma._encode_filter_properties(filters[0])
    header = bytearray(raw[12 : 12 + (raw[12] + 1) * 4])
    header[header.index(b"\x21\x01") + 2] = asked[0]
    header[-4:] = zlib.crc32(bytes(header[:-4])).to_bytes(4, "little")
    raw[12 : 12 + len(header)] = header
    assert refusal(load, {"train.jsonl.xz": bytes(raw)}).code == "unreadable"


@pytest.mark.parametrize(
    "options", [{}, {"use_dictionary": False}, {"data_page_version": "2.0"}, {"compression": "gzip"}]
)
def test_a_parquet_page_that_grows_is_not_decoded(load: Load, smaller: None, options: dict[str, Any]) -> None:
    bomb = parquet({"question": ["a" * 30_000_000], "answer": [1]}, **{"compression": "zstd", **options})
    assert len(bomb) < 200_000
    before = pa.total_allocated_bytes()
    assert refused_within(10, load, {"train.parquet": bomb}).code == "too_large"
    assert pa.total_allocated_bytes() - before < 5_000_000


def test_a_text_that_a_parquet_file_repeats_takes_room_once(load: Load) -> None:
    """A million rows that name one text of a megabyte: a terabyte, as a plain column."""
    same = pa.DictionaryArray.from_arrays(pa.array([0] * 1_000_000, pa.int32()), pa.array(["a" * 1_000_000]))
    bomb = parquet({"question": same, "answer": pa.array([1] * 1_000_000)})
    before = pa.default_memory_pool().max_memory()
    assert refusal(load, {"train.parquet": bomb}, max_rows=200_000).code == "empty"
    assert pa.default_memory_pool().max_memory() - before < 100_000_000


def test_texts_that_begin_like_the_one_before_are_not_decoded(load: Load) -> None:
    texts = ["a" * 100_000 + str(number) for number in range(10_000)]
    bomb = parquet(
        {"question": texts[:2000], "answer": list(range(2000))},
        use_dictionary=False,
        column_encoding={"question": "DELTA_BYTE_ARRAY", "answer": "PLAIN"},
    )
    assert len(bomb) < 1_500_000
    assert refusal(load, {"train.parquet": bomb}).code == "unreadable"


def test_a_footer_is_not_believed_to_be_of_any_size(load: Load) -> None:
    assert refusal(load, {"train.parquet": b"PAR1" + (2**31 - 1).to_bytes(4, "little") + b"PAR1"}).code == "too_large"


@pytest.mark.parametrize("options", [{}, {"use_dictionary": False}, {"data_page_version": "2.0"}])
def test_a_file_of_bearable_size_is_known_by_its_pages(options: dict[str, Any]) -> None:
    file = io.BytesIO(parquet({"a": ["x"] * 1000, "n": list(range(1000))}, row_group_size=300, **options))
    require_bounded(file, rows=1000, group_bytes=20_000)
    with pytest.raises(ValueError, match="more than 999 rows"):
        require_bounded(file, rows=999, group_bytes=20_000)
    with pytest.raises(ValueError, match="more than 1000 bytes"):
        require_bounded(file, rows=1000, group_bytes=1000)


def test_a_small_file_of_many_rows_is_refused_before_it_is_decoded() -> None:
    bomb = parquet({"a": pa.array(["x"] * 10_000_000)}, compression="zstd")
    assert len(bomb) < 100_000
    before = pa.total_allocated_bytes()
    with pytest.raises(ValueError, match="rows"):
        require_bounded(io.BytesIO(bomb), rows=8192, group_bytes=2**28)
    assert pa.total_allocated_bytes() - before < 1_000_000


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"PAR1\x00\x00\x00\x00PAR1x", parquet()[4:], parquet()[:-9]])
def test_what_is_no_whole_parquet_file_is_refused(damage: bytes) -> None:
    with pytest.raises(ValueError):
        require_bounded(io.BytesIO(damage), rows=10, group_bytes=1000)
