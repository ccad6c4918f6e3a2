"""A job's files: every row in exactly one block, however the blocks are cut and read."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serve_app.jobs.columns import Column
from serve_app.jobs.files import Block, Format, JobError, Reader, Rows, inferred, plan, write

ROWS: list[dict[str, Any]] = [
    {"id": str(i), "text": text}
    for i, text in enumerate(
        ["plain", "", 'with "quotes", and commas', "two\nlines", "\r", "ä\u2028b", " ", "{x}", "end"]
    )
]


def save(path: Path, rows: Sequence[dict[str, Any]] = ROWS, **options: Any) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path, **options)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def read(reader: Reader, blocks: Sequence[Block]) -> list[tuple[int, dict[str, Any]]]:
    return [
        pair
        for block in blocks
        for rows in [reader.read(block)]
        for pair in zip(rows.numbers, rows.values, strict=True)
    ]


@pytest.mark.parametrize("block_rows", [1, 2, 4, 100])
@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_blocks_hold_every_row_once_in_any_order_of_reading(tmp_path: Path, suffix: str, block_rows: int):
    paths = [
        save(tmp_path / f"{name}.{suffix}", **({"row_group_size": 5} if suffix == "parquet" else {})) for name in "ba"
    ]
    source = plan([tmp_path], block_rows)
    assert source.files == sorted(paths)
    assert source.columns == ("id", "text")
    assert [block.index for block in source.blocks] == list(range(len(source.blocks)))
    assert all(block.rows <= block_rows for block in source.blocks)
    wanted = [*enumerate(ROWS, 1)] * 2
    reader = Reader(source.format, source.columns)
    assert read(reader, source.blocks) == wanted
    assert sorted(map(str, read(reader, source.blocks[::-1]))) == sorted(map(str, wanted))
    assert sorted(map(str, read(reader, source.blocks[1::2] + source.blocks[::2]))) == sorted(map(str, wanted))
    assert plan([tmp_path], block_rows) == source


def test_a_wrong_row_is_reported_and_the_others_are_read(tmp_path: Path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n{bad\n\n[1]\n  \n\xff\n{"a": 2, "b": null}')
    source = plan([path], 100)
    assert source.columns == ("a", "b")
    rows = Reader("jsonl", source.columns).read(*source.blocks)
    assert rows.numbers == [1, 2, 4, 6, 7]
    assert rows.values == [{"a": 1}, {}, {}, {}, {"a": 2, "b": None}]
    assert {at: reason.split(":")[0] for at, reason in rows.problems.items()} == {
        1: "not JSON",
        2: "not a JSON object",
        3: "not UTF-8",
    }
    assert rows.texts[1] == "{bad"
    path = tmp_path / "in.csv"
    path.write_bytes(b'\xef\xbb\xbfa,b\r\n1,2\r\n3\r\n"4",5\r\n6"7"x,8,"\r\n"\r\n\xff,1\r\n')
    source = plan([path], 100)
    assert source.columns == ("a", "b")
    rows = Reader("csv", source.columns).read(*source.blocks)
    assert [(n, v) for n, v in zip(rows.numbers, rows.values, strict=True) if v] == [
        (1, {"a": "1", "b": "2"}),
        (3, {"a": "4", "b": "5"}),
    ]
    assert len(rows.problems) == 3


@pytest.mark.parametrize("target", ["parquet", "jsonl", "csv"])
@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_kept_rows_are_written_with_their_results(tmp_path: Path, suffix: str, target: Format):
    source = plan([save(tmp_path / f"in.{suffix}")], 100)
    schema = inferred(source) if target == "parquet" != suffix else None
    rows = Reader(source.format, source.columns, fixed=True, schema=schema).read(*source.blocks)
    kept = [0, 3, 8]
    results = {"scores": [[0.25, 0.75]] * 3, "label_mass": [0.5, 0.125, 1.0]}
    out = tmp_path / f"out.{target}"
    write(out, target, rows, kept, results, {"scores": Column(float, [" yes", " no"]), "label_mass": Column(float)})
    if target == "csv":
        with out.open(encoding="utf-8", newline="") as file:
            found = list(csv.DictReader(file))
        more = [{"scores[ yes]": "0.25", "scores[ no]": "0.75", "label_mass": mass} for mass in ("0.5", "0.125", "1.0")]
    else:
        found = (
            pq.read_table(out).to_pylist()
            if target == "parquet"
            else list(map(json.loads, out.read_text().split("\n")[:-1]))
        )
        more = [{"scores": [0.25, 0.75], "label_mass": mass} for mass in results["label_mass"]]
    assert found == [ROWS[at] | own for at, own in zip(kept, more, strict=True)]


def test_parquet_keeps_its_types_and_has_the_same_ones_without_a_row(tmp_path: Path):
    table = pa.table(
        {"n": pa.array([1, None], pa.int16()), "t": pa.array([0, 1], pa.timestamp("ms")), "l": [["a"], []]}
    )
    pq.write_table(table, tmp_path / "in.parquet")
    source = plan([tmp_path / "in.parquet"], 10)
    rows = Reader(source.format, source.columns).read(*source.blocks)
    columns = {"scores": Column(float, ["a"])}
    for kept in ([1], []):
        write(tmp_path / "out", "parquet", rows, kept, {"scores": [[1.0]] * len(kept)}, columns)
        written = pq.read_table(tmp_path / "out")
        assert written.drop_columns("scores") == table.take(pa.array(kept, pa.int64()))
        assert written.schema.field("scores").type == pa.list_(pa.float64())


def test_a_row_that_does_not_fit_the_others_is_reported(tmp_path: Path):
    rows = [{"a": 1, "b": "x"}] * 1_000 + [{"a": "1"}, {"c": 1}, {"b": "y"}]
    source = plan([save(tmp_path / "in.jsonl", rows)], 2_000)
    for schema, wrong in ((inferred(source), [1_000, 1_001]), (None, [1_001])):
        read = Reader("jsonl", source.columns, fixed=True, schema=schema).read(*source.blocks)
        assert sorted(read.problems) == wrong
        assert "'c' is not among those of the first 1,000 rows" in read.problems[1_001]


def test_nothing_that_json_can_hold_stops_the_writing(tmp_path: Path):
    rows = Rows(("a", "b"), [1], [{"a": "\ud800", "b": [1, {"c": "ä"}]}])
    write(tmp_path / "out.jsonl", "jsonl", rows, [0], {}, {})
    assert json.loads((tmp_path / "out.jsonl").read_text()) == rows.values[0]
    write(tmp_path / "out.csv", "csv", rows, [0], {}, {})
    assert '[1, {""c"": ""ä""}]' in (tmp_path / "out.csv").read_text()


def test_files_that_cannot_be_read_are_refused_with_the_reason(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.txt").touch()
    (tmp_path / "not.parquet").write_text("x")
    (tmp_path / "twice.csv").write_text("a,a\n1,2\n")
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    (tmp_path / "b.csv").write_text("b,a\n1,2\n")
    wrong = {
        ("missing",): "missing does not exist",
        ("empty",): "holds no file that ends in .parquet, .jsonl",
        ("other.txt",): "other.txt is in no known format",
        ("not.parquet",): "not.parquet cannot be read as parquet",
        ("a.csv", "not.parquet"): r"several formats \(csv, parquet\)",
        ("twice.csv",): "two columns have the same name in a, a",
        ("a.csv", "b.csv"): "b.csv has the columns b, a; the files before it have a, b",
    }
    for names, said in wrong.items():
        with pytest.raises(JobError, match=said):
            plan([tmp_path / name for name in names], 10)


def test_a_quote_that_is_never_closed_ends_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("serve_app.jobs.files._LONGEST_RECORD", 100)
    path = tmp_path / "in.csv"
    path.write_text('a\n"open\n' + "line\n" * 100)
    with pytest.raises(JobError, match="a quote is not closed"):
        plan([path], 10)
