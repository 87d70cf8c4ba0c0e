"""MixEval-Hard's own files: found in a folder, a clone of the benchmark or a Hub repository, checked, read.

In: where they are, and a version. Out: 1000 rows. The files are not part of this package: the benchmark's authors
publish them (`git clone https://github.com/Psycoy/MixEval`), and its constituents keep their licences. A file that is
not the official one, byte for byte, is named with what is wrong with it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from anchored.errors import EvaluationError
from anchored.runs import one_line

Version = Literal["2024-06-01", "2024-08-11"]
Split = Literal["free-form", "multiple-choice"]

CLONE = "git clone https://github.com/Psycoy/MixEval"
SPLITS: tuple[Split, ...] = ("free-form", "multiple-choice")
SHA256: Mapping[Version, Mapping[Split, str]] = {
    "2024-06-01": {
        "free-form": "55167abde842c86b80504913eaf839a2fbd7e96b4332eb69406f583dbb6ce7c5",
        "multiple-choice": "11e57fa2e1bc6bd3529167e4353991cae7c548e55ccf5067ef42a95971397af1",
    },
    "2024-08-11": {
        "free-form": "4784526892f825d421a43a3c34a139adcfa9f8b17d1898b7e5c57079fecf5b4e",
        "multiple-choice": "3015ee7cc02f20ae7e412e0b42919a9a7d361c6c37de36db5ada38a576a36fea",
    },
}
COUNTS: Mapping[Version, Mapping[Split, Mapping[str, int]]] = {
    "2024-06-01": {
        "free-form": {"TriviaQA": 267, "DROP": 167, "GSM8k": 22, "MATH": 16, "BBH": 16, "AGIEval": 12},
        "multiple-choice": {
            "MMLU": 231,
            "AGIEval": 71,
            "HellaSwag": 61,
            "CommonsenseQA": 50,
            "BoolQ": 37,
            "SIQA": 20,
            "OpenBookQA": 8,
            "GPQA": 8,
            "PIQA": 8,
            "ARC": 4,
            "MBPP": 2,
        },
    },
    "2024-08-11": {
        "free-form": {"TriviaQA": 331, "DROP": 122, "BBH": 20, "MATH": 12, "AGIEval": 8, "GSM8k": 7},
        "multiple-choice": {
            "MMLU": 152,
            "MMLU-Pro": 90,
            "HellaSwag": 61,
            "AGIEval": 57,
            "CommonsenseQA": 51,
            "BoolQ": 32,
            "SIQA": 26,
            "PIQA": 12,
            "OpenBookQA": 8,
            "ARC": 6,
            "GPQA": 3,
            "WinoGrande": 2,
        },
    },
}
"""Rows of each constituent benchmark in the official files."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row as the benchmark's authors publish it."""

    split: Split
    id: str
    """Unique within the split."""
    benchmark: str
    context: str | None
    prompt: str
    options: tuple[str, ...]
    """Of multiple choice; else empty."""
    target: tuple[str, ...]
    """Accepted answers of free form; of multiple choice the right option's letter."""


@dataclass(frozen=True, slots=True)
class Files:
    """Both splits of one version."""

    rows: tuple[Row, ...]
    """Free form first, each split in its file's order."""
    content: str
    """The first 12 hex digits of a sha256 over both files."""
    official: bool


def read_files(source: str | None, version: Version, *, official: bool = True) -> Files:
    """Both splits of a version; `official` refuses files that are not the authors' own. Raises EvaluationError."""
    if source is None:
        raise EvaluationError(
            f"evaluate.mixeval.data: mixeval-hard/{version} needs the benchmark's files; `{CLONE}` and name the clone "
            "(or a folder or Hub id that has them)"
        )
    rows: list[Row] = []
    content, genuine = hashlib.sha256(), True
    folder = _folder(source, version)
    for split in SPLITS:
        file = _find(folder, source, version, split)
        data = _content(file)
        sha = hashlib.sha256(data).hexdigest()
        genuine &= sha == SHA256[version][split]
        content.update(bytes.fromhex(sha))
        _name_other_version(file, version, split, sha)
        found = _read(data, file, split)
        if official and sha != SHA256[version][split]:
            raise EvaluationError(
                f"{file}: {_difference(found, version, split)}; get the official file (`{CLONE}`), or set "
                "evaluate.mixeval.official_data to false to evaluate on this one, under another version's name"
            )
        rows += found
    return Files(tuple(rows), content.hexdigest()[:12], genuine)


def _folder(source: str, version: Version) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise EvaluationError(f"evaluate.mixeval.data: {source} is a file; name the folder that holds mixeval-hard/")
    if not re.fullmatch(r"[\w.\-]+/[\w.\-]+", source):
        raise EvaluationError(f"evaluate.mixeval.data: no folder at {source}; `{CLONE}` and name the clone")
    from huggingface_hub import snapshot_download

    patterns = [f"*mixeval-hard/{split}.json*" for split in SPLITS]
    try:
        return Path(snapshot_download(source, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # the library raises of every kind: network, access, layout
        raise EvaluationError(
            f"evaluate.mixeval.data: no folder {source} here, and the Hub gives no such data set "
            f"({one_line(error)[:200]}); `{CLONE}` and name the clone"
        ) from None


def _find(folder: Path, source: str, version: Version, split: Split) -> Path:
    for root in (folder, folder / "mix_eval" / "data", folder / "data"):
        for inner in (f"mixeval-{version}/mixeval-hard", f"{version}/mixeval-hard", "mixeval-hard", "."):
            for name in (f"{split}.json", f"{split}.json.gz"):
                if (file := root / inner / name).is_file():
                    return file
    raise EvaluationError(
        f"evaluate.mixeval.data: {source} holds no mixeval-{version}/mixeval-hard/{split}.json; name a clone of the "
        f"benchmark (`{CLONE}`) or its folder mix_eval/data"
    )


def _content(file: Path) -> bytes:
    try:
        return gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError) as error:
        raise EvaluationError(f"{file}: cannot be read ({one_line(error)}); get it again (`{CLONE}`)") from None


def _name_other_version(file: Path, version: Version, split: Split, sha: str) -> None:
    for other, splits in SHA256.items():
        for which, known in splits.items():
            if sha == known and (other, which) != (version, split):
                raise EvaluationError(
                    f"{file}: is the {which} file of version {other}, where {split} of {version} is expected; name "
                    f"mixeval-hard/{other} in evaluate.benchmarks, or put the right file there"
                )


def _read(data: bytes, file: Path, split: Split) -> list[Row]:
    doubled: list[str] = []

    def noticing_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        doubled.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return dict(pairs)

    try:
        found = json.loads(data, object_pairs_hook=noticing_doubles)
    except ValueError as error:
        raise EvaluationError(f"{file}: is not JSON ({one_line(error)}); get it again (`{CLONE}`)") from None
    if not isinstance(found, dict) or not found:
        raise EvaluationError(f"{file}: holds no rows by their ids, as MixEval's files do; get it again (`{CLONE}`)")
    if doubled:
        raise EvaluationError(
            f"{file}: {len(doubled)} keys stand twice in it, the first is {doubled[0]!r}; get it again (`{CLONE}`)"
        )
    return [_row(file, split, key, row) for key, row in found.items()]


def _row(file: Path, split: Split, key: str, row: Any) -> Row:
    def bad(what: str) -> EvaluationError:
        return EvaluationError(f"{file}, row {key}: {what}; get the file again (`{CLONE}`)")

    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("prompt", "benchmark_name")):
        raise bad("has no `prompt` or no `benchmark_name`")
    if row.get("problem_type", split) != split:
        raise bad(f"is {row['problem_type']!r}, where {split} is expected")
    target, options = row.get("target"), row.get("options", [])
    if not isinstance(target, list) or not target or not isinstance(options, list):
        raise bad("`target` must be a list with something in it, and `options` a list")
    texts = tuple(map(str, options))
    if split == "multiple-choice":
        if len(target) != 1 or type(target[0]) is not int or not 0 <= target[0] < len(texts) <= 26:
            raise bad("`target` must hold the number of one of the `options`")
        right = (letter(target[0]),)
    else:
        right = tuple(map(str, target))
    context = row.get("context")
    return Row(
        split, key, row["benchmark_name"], None if context is None else str(context), row["prompt"], texts, right
    )


def letter(place: int) -> str:
    """A, B, C, ... for 0, 1, 2, ..."""
    return chr(ord("A") + place)


def _difference(rows: list[Row], version: Version, split: Split) -> str:
    """What tells a file from the official one, in a few words."""
    expected = COUNTS[version][split]
    total = sum(expected.values())
    ids = [row.id for row in rows]
    missing = [name for name in map(str, range(total)) if name not in set(ids)]
    surplus = [name for name in ids if not (name.isdigit() and int(name) < total)]
    found = Counter(row.benchmark for row in rows)
    counts = ", ".join(
        f"{found[name]} of {expected.get(name, 0)} {name}"
        for name in sorted({*expected, *found})
        if found[name] != expected.get(name, 0)
    )
    parts = [
        f"has {len(rows)} rows, not the {total} of {version}" if len(rows) != total else "",
        f"lacks {len(missing)} (the first is {missing[0]})" if missing else "",
        f"has {len(surplus)} too many (the first is {surplus[0]})" if surplus else "",
        f"rows per benchmark differ: {counts}" if counts else "",
    ]
    return ", ".join(filter(None, parts)) or f"differs from the official {split} file of {version} in its text"


def versions() -> Iterator[Version]:
    """All that are known."""
    for version in SHA256:
        yield cast(Version, version)
