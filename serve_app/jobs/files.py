"""A job's data files: Parquet, JSON lines or CSV, cut into blocks of rows that are read and written one at a time.

Needs pyarrow, which the extra ``data`` brings.
"""

# pyright: reportUnknownParameterType=false
# pyarrow has no types.

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, cast

import pyarrow as pa  # pyright: ignore[reportMissingTypeStubs]
import pyarrow.parquet as pq  # pyright: ignore[reportMissingTypeStubs]

from serve_app.jobs.columns import Column

Format = Literal["parquet", "jsonl", "csv"]

_SUFFIXES: dict[str, Format] = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv"}

_BATCH = 4_096
"""Rows of Parquet that are decoded at a time."""

_LOOKED_AT = 1_000
"""Rows at the start of JSON lines that determine the columns."""

csv.field_size_limit(2**31 - 1)

_LONGEST_RECORD = 2**26
"""Most bytes of a CSV row; a longer one has a quote that is not closed."""

Row = dict[str, Any]


class JobError(Exception):
    """A job cannot be done. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Block:
    """Rows that are scored and written together.

    Attributes:
        index: number of the block in the job, from 0.
        start, stop: range of bytes in the file; for Parquet, of rows in the row group ``group``.
        first_row: number of the first row in the file, from 1.
        rows: how many rows there are; blank lines are not counted.
    """

    index: int
    path: str
    start: int
    stop: int
    first_row: int
    rows: int
    group: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """What a job reads.

    Attributes:
        files: the files in reading order.
        columns: the columns that a template may name.
        blocks: the blocks, which cover all rows in order.
    """

    format: Format
    files: list[Path]
    columns: tuple[str, ...]
    blocks: list[Block]


Results = dict[str, list[Any]]
"""The added columns by name, each with one value per row."""


@dataclass(slots=True)
class Rows:
    """The rows of a block.

    Attributes:
        columns: the columns that CSV output has.
        numbers: each row's number in its file, from 1.
        values: each row's values by column; empty if the row cannot be read.
        problems: why a row cannot be used, by position.
        texts: the text of a row that cannot be read, by position.
        table: the same rows as a table, if they come from Parquet.
        schema: the schema for Parquet output of other input.
    """

    columns: Sequence[str]
    numbers: list[int]
    values: list[Row]
    problems: dict[int, str] = field(default_factory=dict[int, str])
    texts: dict[int, str] = field(default_factory=dict[int, str])
    table: pa.Table | None = None
    schema: pa.Schema | None = None


def find(inputs: Sequence[Path]) -> tuple[Format, list[Path]]:
    """Find the files, those of a folder sorted by name, and their format.

    Raises:
        JobError: a file does not exist, a folder has no data files, or there are several formats.
    """
    files: list[Path] = []
    for path in inputs:
        if not path.exists():
            raise JobError(f"{path} does not exist")
        inside = sorted(each for each in path.rglob("*") if each.suffix in _SUFFIXES and each.is_file())
        files += inside if path.is_dir() else [path]
        if path.is_dir() and not inside:
            raise JobError(f"{path} holds no file that ends in {', '.join(_SUFFIXES)}; name another folder")
    formats = {_SUFFIXES.get(path.suffix) for path in files}
    if None in formats:
        other = next(path for path in files if path.suffix not in _SUFFIXES)
        raise JobError(f"{other} is in no known format; the name must end in {', '.join(_SUFFIXES)}")
    if len(formats) != 1:
        raise JobError(
            f"the input has files of several formats ({', '.join(sorted(map(str, formats)))}); use one for each job"
        )
    return cast(Format, formats.pop()), [path.resolve() for path in files]


def plan(inputs: Sequence[Path], block_rows: int) -> Source:
    """Cut the input into blocks. Reads JSON lines and CSV once, and only the footers of Parquet.

    Raises:
        JobError: the input cannot be used.
    """
    format_, files = find(inputs)
    columns: dict[str, None] = {}
    blocks: list[Block] = []
    for path in files:
        try:
            if format_ == "parquet":
                own, cuts = _plan_parquet(path, block_rows)
            else:
                own, cuts = _plan_lines(path, block_rows, quotes=format_ == "csv")
        except (OSError, pa.ArrowException, csv.Error, UnicodeDecodeError) as error:
            raise JobError(f"{path} cannot be read as {format_}: {error}") from error
        if format_ != "jsonl" and columns and list(columns) != own:
            raise JobError(f"{path} has the columns {', '.join(own)}; the files before it have {', '.join(columns)}")
        columns |= dict.fromkeys(own)
        blocks += [Block(len(blocks) + at, str(path), *cut) for at, cut in enumerate(cuts)]
    return Source(format_, files, tuple(columns), blocks)


_Cut = tuple[int, int, int, int, int]
"""A block's start, stop, first_row, rows and group."""


def _plan_parquet(path: Path, block_rows: int) -> tuple[list[str], list[_Cut]]:
    cuts: list[_Cut] = []
    with pq.ParquetFile(path) as file:
        row = 1
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            for start in range(0, count, block_rows):
                stop = min(start + block_rows, count)
                cuts.append((start, stop, row + start, stop - start, group))
            row += count
        return file.schema_arrow.names, cuts


def _plan_lines(path: Path, block_rows: int, *, quotes: bool) -> tuple[list[str], list[_Cut]]:
    cuts: list[_Cut] = []
    columns: dict[str, None] = {}
    start = end = rows = number = 0
    first = 1
    with path.open("rb") as file:
        for line in _records(file, quotes=quotes):
            if quotes and not columns:
                columns = dict.fromkeys(_header(line))
                start = end = end + len(line)
                continue
            end += len(line)
            number += 1
            if not quotes and number <= _LOOKED_AT:
                columns |= dict.fromkeys(_keys(line))
            rows += bool(line.strip())
            if rows == block_rows:
                cuts.append((start, end, first, rows, 0))
                start, rows, first = end, 0, number + 1
    if rows:
        cuts.append((start, end, first, rows, 0))
    return list(columns), cuts


def _records(file: IO[bytes], *, quotes: bool) -> Iterator[bytes]:
    """Yield lines; with ``quotes``, CSV records, in which quoted values may contain line ends."""
    record = bytearray()
    inside = False
    for line in file:
        record += line
        inside ^= quotes and line.count(b'"') % 2 == 1
        if not inside:
            yield bytes(record)
            record.clear()
        elif len(record) > _LONGEST_RECORD:
            raise csv.Error(f"a quote is not closed: {bytes(record[:60])!r}...")
    if record:
        yield bytes(record)


def _header(line: bytes) -> list[str]:
    (names,) = csv.reader([line.decode("utf-8-sig")])
    if len(set(names)) != len(names):
        raise csv.Error(f"two columns have the same name in {', '.join(names)}")
    return names


def _keys(line: bytes) -> list[str]:
    try:
        row = json.loads(line)
    except ValueError:
        return []
    return list(cast(Row, row)) if isinstance(row, dict) else []


class Reader:
    """Reads blocks of one source. Reading Parquet is cheapest in the order of the blocks.

    Args:
        fixed: a row with any other column is a problem.
        schema: a row with a value that does not fit it is a problem.
    """

    def __init__(
        self, format_: Format, columns: Sequence[str], *, fixed: bool = False, schema: pa.Schema | None = None
    ) -> None:
        self._fixed = fixed
        self._format = format_
        self._columns = list(columns)
        self._schema = schema
        self._where: tuple[str, int, int] | None = None
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._ahead: pa.Table | None = None

    def read(self, block: Block) -> Rows:
        """Read all rows of the block."""
        if self._format == "parquet":
            return self._read_parquet(block)
        with Path(block.path).open("rb") as file:
            file.seek(block.start)
            content = io.BytesIO(file.read(block.stop - block.start))
        rows = Rows(self._columns, [], [], schema=self._schema)
        number = block.first_row
        for line in _records(content, quotes=self._format == "csv"):
            if line.strip():
                try:
                    rows.values.append(self._row(line))
                except ValueError as error:
                    rows.problems[len(rows.values)] = str(error)
                    rows.texts[len(rows.values)] = line.decode(errors="replace").rstrip("\r\n")
                    rows.values.append({})
                rows.numbers.append(number)
            number += 1
        return rows

    def _row(self, line: bytes) -> Row:
        try:
            text = line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8: {error}") from None
        if self._format == "csv":
            try:
                (values,) = csv.reader([text], strict=True)
            except csv.Error as error:
                raise ValueError(f"not CSV: {error}") from None
            if len(values) != len(self._columns):
                raise ValueError(f"has {len(values)} values for {len(self._columns)} columns")
            row: Row = dict(zip(self._columns, values, strict=True))
        else:
            try:
                row = json.loads(text)
            except ValueError as error:
                raise ValueError(f"not JSON: {error}") from None
            if not isinstance(row, dict):  # pyright: ignore[reportUnnecessaryIsInstance] - the file may hold anything
                raise ValueError("not a JSON object")
        if self._fixed and (more := row.keys() - set(self._columns)):
            raise ValueError(f"the column {min(more)!r} is not among those of the first {_LOOKED_AT:,} rows")
        if self._schema is not None:
            try:
                pa.Table.from_pylist([row], self._schema)
            except (pa.ArrowException, TypeError) as error:
                raise ValueError(f"does not fit the first rows' types: {error}") from None
        return row

    def _read_parquet(self, block: Block) -> Rows:
        if self._where != (block.path, block.group, block.start):
            self._batches = pq.ParquetFile(block.path).iter_batches(_BATCH, row_groups=[block.group])
            self._ahead = None
            left = block.start
            while left:
                left -= self._next(min(left, _BATCH)).num_rows
        table = self._next(block.stop - block.start)
        self._where = (block.path, block.group, block.stop)
        numbers = list(range(block.first_row, block.first_row + table.num_rows))
        return Rows(self._columns, numbers, table.to_pylist(), table=table)

    def _next(self, count: int) -> pa.Table:
        """Read the next ``count`` rows of the row group."""
        ahead = self._ahead
        while ahead is None or ahead.num_rows < count:
            more = pa.Table.from_batches([next(self._batches)])
            ahead = more if ahead is None else pa.concat_tables([ahead, more])
        self._ahead = ahead.slice(count)
        return ahead.slice(0, count)


def inferred(source: Source) -> pa.Schema:
    """Infer the schema for Parquet output from the first rows.

    Raises:
        JobError: the rows have no common types.
    """
    reader = Reader(source.format, source.columns)
    rows: list[Row] = []
    for block in source.blocks:
        rows += [row for row in reader.read(block).values if row]
        if len(rows) >= _LOOKED_AT:
            break
    try:
        return pa.Table.from_pylist(rows[:_LOOKED_AT]).schema
    except (pa.ArrowException, TypeError) as error:
        raise JobError(f"the rows have no common types for Parquet: {error}; use --format jsonl") from error


def write(
    path: Path, format_: Format, rows: Rows, kept: Sequence[int], results: Results, columns: Mapping[str, Column]
) -> None:
    """Write the rows at the positions ``kept``, each with its results.

    Args:
        columns: the columns of the results.
    """
    if format_ == "parquet":
        table = rows.table
        if table is None:
            table = pa.Table.from_pylist([row or {} for row in rows.values], rows.schema)
        table = table.take(pa.array(kept, pa.int64()))
        for name, values in results.items():
            table = table.append_column(name, pa.array(values, _arrow_type(columns[name])))
        pq.write_table(table, path)
        return
    if format_ == "csv":
        results = _flat(results, columns)
    values = [rows.values[at] | {name: own[i] for name, own in results.items()} for i, at in enumerate(kept)]
    if format_ == "jsonl":
        write_lines(path, values)
        return
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.DictWriter(file, [*rows.columns, *results])
        writer.writeheader()
        for row in values:
            writer.writerow(
                {name: _json(value) if isinstance(value, list | dict) else value for name, value in row.items()}
            )


_ARROW_TYPES = {float: pa.float64(), int: pa.int64(), str: pa.string()}


def _arrow_type(column: Column) -> pa.DataType:
    kind: pa.DataType = _ARROW_TYPES[column.value]
    for _ in range(column.depth if column.labels is None else 1):
        kind = pa.list_(kind)
    return kind


def write_lines(path: Path, rows: Sequence[Row]) -> None:
    """Write one JSON object per line."""
    # A lone surrogate cannot be encoded; it becomes a JSON escape again.
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for row in rows:
            file.write(_json(row) + "\n")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _flat(results: Results, columns: Mapping[str, Column]) -> Results:
    """Replace each column of lists by one column per label."""
    flat: Results = {}
    for name, values in results.items():
        labels = columns[name].labels
        if labels is not None:
            flat |= {f"{name}[{label}]": [own[at] for own in values] for at, label in enumerate(labels)}
        else:
            flat[name] = values
    return flat
