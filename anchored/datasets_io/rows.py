"""The rows of a file, a folder or a Hub data set, one by one, each with the place where it stands.

What cannot be read row by row (a line that is not JSON) is a row with an error; what cannot be read at all is a
DataError. Nothing here knows what the columns mean.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePath
from typing import IO, Any, cast

from anchored.datasets_io.cells import kind, malformed
from anchored.datasets_io.places import Place, files_below, is_address, opened, place_of, problem
from anchored.errors import DataError
from anchored.runs import DECISIONS, one_line

_ENDINGS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv")
_PACKED = (".gz", ".zst", ".bz2", ".xz")
_LISTS = ("data", "rows", "examples", "train")
"""What the list of rows is called in a .json file that is one object."""
_SHARD = re.compile(r"(?P<split>.+?)[-_]\d+(?:-of-\d+|$)")
_SPLIT_FOLDER = re.compile(r"train|test|val|valid|validation|dev|eval")
_NOT_FOR_TRAINING = re.compile(r"(?:^|[\W_])(?:test|val|valid|validation|dev|eval)(?:$|[\W_])")
_UTF8_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source."""

    where: str
    """For people: `train.jsonl line 3`."""
    columns: Mapping[str, Any]
    error: str = ""
    """Why it could not be read."""

    def readable(self) -> Mapping[str, Any]:
        """The columns; raises Refused if the row could not be read."""
        if self.error:
            raise malformed(self.error)
        return self.columns


def read(source: str | Path, split: str | None = None, wanted: Collection[str] = ()) -> Iterator[Row]:
    """The rows of a source; where that saves reading, only the `wanted` columns of them."""
    path = place_of(source)
    if (
        isinstance(path, Path)
        and path.is_dir()
        and ((path / "state.json").exists() or (path / "dataset_dict.json").exists())
    ):
        yield from _dataset_rows(_load_dataset(str(path), split, on_disk=True), str(source), wanted)
    elif path.exists():
        for file in _files(path, split):
            yield from _file_rows(file, wanted)
    elif is_address(source):
        raise DataError(
            f"{path}: there is no such file or folder; correct the address, or see whether its bucket is there"
        )
    elif isinstance(source, str) and re.fullmatch(r"\w[\w.-]*/[\w.-]+", source) and not _format(path.name):
        yield from _dataset_rows(_load_dataset(source, split), source, wanted)
    else:
        looked_in = "" if os.path.isabs(source) else f" in {os.getcwd()}"
        raise DataError(f"{source}: no such file or folder{looked_in}; a Hub id looks like openbmb/UltraFeedback")


def _files(path: Place, split: str | None) -> list[Place]:
    """The data files of a source; where a folder holds several splits, those of `split`, else of `train`.

    Without one called so, all files are taken, but never a test split among others unasked.
    """
    if path.is_file():
        return [path]
    if (path / "pairs.parquet").exists():  # a run folder
        return [path / "pairs.parquet"]
    by_split: dict[str, list[Place]] = {}
    for file in files_below(path):
        hidden = any(part.startswith(".") for part in file.parts)
        about_data = file.name.startswith("dataset_info") or file.name.endswith(DECISIONS)
        if _format(file.name) and not hidden and not about_data:
            by_split.setdefault(_split_of(file), []).append(path / str(file))
    if not by_split and (path / "recipe.yaml").exists():
        raise DataError(f"{path}: this run folder has no pairs yet; `anchored create` makes them")
    if not by_split:
        raise DataError(f"{path}: holds no {', '.join(_ENDINGS)} file")
    chosen = split or ("train" if "train" in by_split else None)
    if chosen is None and len(by_split) > 1 and any(map(_NOT_FOR_TRAINING.search, by_split)):
        names = ", ".join(sorted(by_split))
        raise DataError(f"{path}: has several splits; name one of its files, or set split to one of {names}")
    if chosen is None:
        return [file for files in by_split.values() for file in files]
    if chosen not in by_split:
        raise DataError(f"{path}: has no split {chosen!r}; there are {', '.join(sorted(by_split))}")
    return by_split[chosen]


def _format(name: str) -> str:
    file = PurePath(name.lower())
    ending = file.with_suffix("").suffix if file.suffix in _PACKED else file.suffix
    return ending if ending in _ENDINGS else ""


def _unpacked(handle: IO[bytes], name: str) -> IO[bytes]:
    """What a file holds, by its last ending."""
    ending = PurePath(name.lower()).suffix
    if ending == ".zst":
        import pyarrow

        return io.BufferedReader(cast("io.RawIOBase", pyarrow.CompressedInputStream(handle, "zstd")))
    openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return cast("IO[bytes]", openers[ending](handle)) if ending in openers else handle


def _split_of(file: PurePath) -> str:
    """What a file's folder is called, where that is a split's name, else the file itself without its number."""
    folder = next((part for part in file.parts[:-1] if _SPLIT_FOLDER.fullmatch(part)), None)
    if folder:
        return folder
    stem = file.name.split(".")[0]
    shard = _SHARD.match(stem)
    return shard["split"] if shard else stem


def _file_rows(file: Place, wanted: Collection[str]) -> Iterator[Row]:
    form = _format(file.name)
    if not form:
        raise DataError(f"{file}: its ending is none of {', '.join(_ENDINGS)} (each also with {', '.join(_PACKED)})")
    try:
        with closing(opened(file, in_order=not file.name.endswith(".parquet"))) as packed:
            handle = _unpacked(packed, file.name)
            if form == ".parquet":
                yield from _parquet_rows(handle, file.name, wanted)
            elif form in (".csv", ".tsv"):
                yield from _csv_rows(handle, file.name)
            elif form == ".json":
                yield from _json_rows(handle, file.name)
            else:
                yield from _jsonl_rows(handle, file.name)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({one_line(error)}); save it as UTF-8") from None
    except (OSError, EOFError, csv.Error, lzma.LZMAError) as error:
        raise DataError(f"{file}: cannot be read ({problem(file, error)})") from None


def _jsonl_rows(handle: IO[bytes], name: str) -> Iterator[Row]:
    for number, line in enumerate(handle, 1):
        spelt = line.removeprefix(_UTF8_MARK).strip()
        if not spelt:
            continue
        where = f"{name} line {number}"
        try:
            value = json.loads(spelt)
        except (ValueError, RecursionError) as error:
            yield Row(where, {}, f"is not JSON ({one_line(error)})")
        else:
            yield _row(where, value)


def _json_rows(handle: IO[bytes], name: str) -> Iterator[Row]:
    """A .json file is a list of objects, also under a name such as `data`, one object, an object of objects by id, or
    in truth lines of JSON."""
    data = handle.read().removeprefix(_UTF8_MARK)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        if data.lstrip().startswith(b"["):
            raise DataError(f"{name}: is not JSON ({one_line(error)})") from None
        yield from _jsonl_rows(io.BytesIO(data), name)
        return
    if isinstance(value, dict) and value and all(isinstance(item, dict) for item in value.values()):
        value = [{"id": id, **item} for id, item in value.items()]
    if isinstance(value, dict):
        value = next((value[name] for name in _LISTS if isinstance(value.get(name), list)), value)
    for number, item in enumerate(value if isinstance(value, list) else [value], 1):
        yield _row(f"{name} row {number}", item)


def _row(where: str, value: Any) -> Row:
    if isinstance(value, str):
        return Row(where, {"prompt": value})
    if not isinstance(value, dict):
        return Row(where, {}, f"holds {kind(value)}, not an object with columns")
    return Row(where, value)


def _csv_rows(handle: IO[bytes], name: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # answers are longer than the module's 128 KiB
    with io.TextIOWrapper(handle, "utf-8-sig", newline="") as lines:
        header = lines.readline()
        parted_by = next((mark for mark in ",\t;" if mark in header), ",")
        for number, record in enumerate(csv.DictReader(chain([header], lines), delimiter=parted_by), 1):
            error = "has more fields than the header has names" if None in record else ""
            yield Row(f"{name} row {number}", {} if error else record, error)


def _parquet_rows(handle: IO[bytes], name: str, wanted: Collection[str]) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(handle)
        columns, number = _some(file.schema_arrow.names, wanted), 0
        for group in range(file.num_row_groups):  # of all that one call is to give, pyarrow holds the bytes at once
            for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield Row(f"{name} row {number}", record)
    except pyarrow.ArrowException as error:
        raise DataError(f"{name}: is not a readable parquet file ({one_line(error)})") from None


def _load_dataset(source: str, split: str | None, on_disk: bool = False) -> Any:
    import datasets

    try:
        found: Any = datasets.load_from_disk(source) if on_disk else datasets.load_dataset(source)
    except Exception as error:  # the library raises of every kind: network, access, layout
        raise DataError(f"{source}: no such path here, and {_hub_problem(error)}") from None
    if not isinstance(found, dict):
        return found
    chosen = split or ("train" if "train" in found else next(iter(found)) if len(found) == 1 else None)
    if chosen not in found:
        problem = f"no split {split!r}" if split else "several splits"
        raise DataError(f"{source}: has {problem}; set split to one of {', '.join(found)}")
    return found[chosen]


def _hub_problem(error: Exception) -> str:
    if isinstance(error, ConnectionError):
        return (
            "not to be had from the Hub: it was never downloaded here and the Hub cannot be reached; correct the path, "
            "mend the network, or name a folder of the data"
        )
    return f"no such data set on the Hub ({one_line(error)}); correct the name, or `hf auth login` if it is private"


def _dataset_rows(data: Any, source: str, wanted: Collection[str]) -> Iterator[Row]:
    columns = _some(data.column_names, wanted)
    for number, record in enumerate(data.select_columns(columns) if columns else data, 1):
        yield Row(f"{source} row {number}", record)


def _some(names: Sequence[str], wanted: Collection[str]) -> list[str] | None:
    """The wanted ones of the columns; None, for all, where there is no choice to make."""
    return [name for name in names if name in wanted] or None
