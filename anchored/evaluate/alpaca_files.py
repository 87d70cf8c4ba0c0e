"""AlpacaEval's own files: the benchmark's data, models' outputs, judges' annotations. Read, checked, written.

The benchmark's data is not part of this package (CC BY-NC 4.0): put it into a folder, from `SOURCE`. What is not the
official file, byte for byte or by content, is named in what comes of it.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from anchored.errors import EvaluationError
from anchored.evaluate.length_control import GamedRows
from anchored.evaluate.preference import TIE
from anchored.runs import one_line, write_text

SOURCE = "https://huggingface.co/datasets/tatsu-lab/alpaca_eval/tree/2edc6fad8be6b14ea7230aabfd08188da6b8b814"
BASELINE = "alpaca_eval_gpt4_baseline.json"
REGRESSION = "df_gamed.csv"
DIFFICULTY = "instruction_difficulty.csv"
SHA256 = {
    BASELINE: "83db546b872ddebee8965fd05fa48461ee3c32bc695c62fb57f2d214ff741ec4",
    REGRESSION: "97aeec3f1c7de6dee6fd31fe66f1702623f4614c3efe1c6fc5f4927cd5fd674d",
    DIFFICULTY: "e28d875bb334f75e17acd1e4ed659b261860e3db379cf5de29060301bed0a18b",
}
"""Of the official files."""
INSTRUCTIONS_SHA256 = "19335c314b25f2550db9138cbbc7c1219ac28967bd6062cd323182405afbd7f1"
OUTPUTS_SHA256 = "127776d241d510697c5116f0efba9cdd07bfbb828678a7376d388f7c22732211"
"""Of the texts in the official baseline file, each followed by a zero byte: however the JSON is laid out."""
INSTRUCTIONS = 805


@dataclass(frozen=True, slots=True)
class Instruction:
    """One question of the benchmark, with the baseline's answer."""

    text: str
    dataset: str
    baseline: str


@dataclass(frozen=True, slots=True)
class AlpacaData:
    """The benchmark: instructions in the official order, and what length control needs."""

    instructions: tuple[Instruction, ...]
    baseline: str
    """The name of the baseline model."""
    difficulty: Float[ndarray, " instructions"] | None
    """None where no table tells it, and then length cannot be controlled for."""
    gamed: GamedRows | None
    regression: str
    """Which regression data there is: `official`, `none`, or the substitute's name and hash."""
    version: str
    """The first 12 hex digits of a sha256 over all of it."""
    notes: tuple[str, ...] = ()
    """What is not the official data, for people."""

    def difficulty_of(self, places: Sequence[int]) -> Float[ndarray, " places"]:
        """Of the instructions at these places; NaN where it is not known."""
        return np.full(len(places), np.nan) if self.difficulty is None else self.difficulty[list(places)]


@dataclass(frozen=True, slots=True)
class Outputs:
    """A model's answers, in the order of the benchmark's instructions."""

    generator: str
    answers: tuple[str | None, ...]
    """None where the file has none."""

    @property
    def missing(self) -> int:
        """Instructions without an answer."""
        return sum(answer is None for answer in self.answers)


@dataclass(frozen=True, slots=True)
class Annotation:
    """One judged instruction, as a line of an annotations file has it."""

    instruction: str
    baseline: str
    """The baseline's answer (`output_1`)."""
    answer: str
    """The model's (`output_2`)."""
    preference: float | None
    """1 (the baseline's answer is better) to 2 (the model's is); None where no verdict could be had."""
    baseline_model: str = ""
    model: str = ""
    annotator: str = ""
    dataset: str = ""
    raw: Any = None
    """What the judge sent back (`raw_completion`)."""


def read_data(folder: str | Path) -> AlpacaData:
    """The benchmark from a folder with `BASELINE`, `DIFFICULTY` or `REGRESSION`, and better both.

    Instructions of one's own may be without tables, and have no length-controlled rate then. Raises EvaluationError
    where a file is missing, is no such file, or has other instructions.
    """
    root = Path(folder).expanduser()
    baseline, regression, difficulty = (_find(root, name) for name in (BASELINE, REGRESSION, DIFFICULTY))
    if baseline is None:
        raise EvaluationError(f"{root}: holds no {BASELINE}; get it from {SOURCE}")
    files = [file for file in (baseline, regression, difficulty) if file]
    shas = {file: _sha256(file) for file in files}
    instructions, name, notes = _read_baseline(baseline, of_officials=bool({*shas.values()} & {*SHA256.values()}))
    n = len(instructions)
    if regression is None and difficulty is None:
        if _are_official(instructions):
            raise EvaluationError(f"{root}: holds neither {REGRESSION} nor {DIFFICULTY}; get both from {SOURCE}")
        notes.append(
            f"no length-controlled rate, for {root} holds no {DIFFICULTY} of its instructions; what makes answers "
            "longer may raise their win rate by that alone"
        )
        return AlpacaData(instructions, name, None, None, "none", _version(shas), tuple(notes))
    gamed, known, source = None, None, "none"
    if regression:
        gamed, known = _read_regression(regression, n)
        official = shas[regression] == SHA256[REGRESSION]
        source = "official" if official else f"{regression.name} (sha256 {shas[regression][:12]})"
    if source == "none":
        notes.append(f"no {REGRESSION} (from {SOURCE}): length control is the package's length_controlled_noreg")
    elif source != "official":
        notes.append(f"length control uses {source} in place of the official {REGRESSION}")
    if difficulty:
        known = _read_difficulty(difficulty, n)
        if shas[difficulty] != SHA256[DIFFICULTY]:
            notes.append(f"{difficulty.name} is not the official {DIFFICULTY}")
    assert known is not None
    return AlpacaData(instructions, name, known, gamed, source, _version(shas), tuple(notes))


def read_outputs(path: str | Path, data: AlpacaData) -> Outputs:
    """A model's answers from a file of model outputs (`instruction`, `output`, `generator`).

    Missing instructions are counted in the result. Raises EvaluationError where the file has an instruction that the
    benchmark has not, or one twice, for it then answers another benchmark.
    """
    file = Path(path)
    rows = _rows(file, ("instruction", "output"))
    known = {instruction.text for instruction in data.instructions}
    answers = {row["instruction"]: row["output"] for row in rows}
    if unknown := [row["instruction"] for row in rows if row["instruction"] not in known]:
        raise EvaluationError(
            f"{file}: {len(unknown)} of its {len(rows)} instructions are not among the benchmark's {len(known)} "
            f"(the first: {_beginning(unknown[0])}); answer the instructions of {BASELINE}"
        )
    if len(answers) < len(rows):
        raise EvaluationError(f"{file}: answers {len(rows) - len(answers)} instructions twice; keep one answer each")
    names = Counter(str(row.get("generator") or file.parent.name) for row in rows)
    if len(names) > 1:
        raise EvaluationError(f"{file}: is of several generators ({', '.join(names)}); write a file for each")
    return Outputs(next(iter(names)), tuple(answers.get(instruction.text) for instruction in data.instructions))


def write_outputs(path: str | Path, outputs: Outputs, data: AlpacaData) -> None:
    """A file of model outputs that alpaca_eval reads; instructions without an answer are left out."""
    _write(
        path,
        (
            {
                "dataset": instruction.dataset,
                "instruction": instruction.text,
                "output": answer,
                "generator": outputs.generator,
            }
            for instruction, answer in zip(data.instructions, outputs.answers, strict=True)
            if answer is not None
        ),
    )


def read_annotations(path: str | Path) -> list[Annotation]:
    """The judged rows of an annotations file; a preference that is null or NaN is None, an old draw (0) is 1.5."""
    file = Path(path)
    return [_annotation(row, file, place) for place, row in enumerate(_rows(file, ("instruction",)))]


def write_annotations(path: str | Path, annotations: Iterable[Annotation]) -> None:
    """An annotations file that alpaca_eval reads."""
    _write(
        path,
        (
            {
                "instruction": one.instruction,
                "output_1": one.baseline,
                "generator_1": one.baseline_model,
                "dataset": one.dataset,
                "output_2": one.answer,
                "generator_2": one.model,
                "annotator": one.annotator,
                "preference": one.preference,
                "raw_completion": one.raw,
            }
            for one in annotations
        ),
    )


def write_leaderboard(path: str | Path, row: Mapping[str, Any]) -> None:
    """A leaderboard of one model, in alpaca_eval's columns; what is not known is empty."""
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows([row.keys(), row.values()])
    write_text(Path(path), lines.getvalue())


def in_order(annotations: Sequence[Annotation], data: AlpacaData) -> list[Annotation | None]:
    """The annotations by the benchmark's instructions, None where there is none.

    Raises EvaluationError where one is of another instruction, doubled, or judged against another baseline's answer.
    """
    places = {instruction.text: place for place, instruction in enumerate(data.instructions)}
    found: list[Annotation | None] = [None] * len(places)
    for one in annotations:
        place = places.get(one.instruction)
        if place is None:
            raise EvaluationError(
                f"the annotation of {_beginning(one.instruction)} is of none of the benchmark's {len(places)} "
                "instructions; give annotations of this benchmark"
            )
        if found[place] is not None:
            raise EvaluationError(f"{_beginning(one.instruction)} is annotated twice; give annotations of one model")
        if one.baseline != data.instructions[place].baseline:
            raise EvaluationError(
                f"{_beginning(one.instruction)} is judged against another answer than that of {data.baseline}; length "
                "control holds against the benchmark's baseline alone"
            )
        found[place] = one
    return found


def _version(shas: Mapping[Path, str]) -> str:
    return hashlib.sha256("".join(shas.values()).encode()).hexdigest()[:12]


def _are_official(instructions: Sequence[Instruction]) -> bool:
    return _texts_sha256([one.text for one in instructions]) == INSTRUCTIONS_SHA256


def _find(root: Path, name: str) -> Path | None:
    """The file itself, packed, or another of its kind (df_gamed_mine.csv)."""
    stem, ending = name.split(".")
    exact = [file for file in (root / name, root / f"{name}.gz") if file.is_file()]
    others = [file for end in (ending, f"{ending}.gz") for file in sorted(root.glob(f"{stem}_*.{end}"))]
    if not exact and len(others) > 1:
        raise EvaluationError(f"{root}: holds {others[0].name} and {others[1].name}; keep the one to use")
    return next(iter([*exact, *others]), None)


def _read_baseline(file: Path, *, of_officials: bool) -> tuple[tuple[Instruction, ...], str, list[str]]:
    """Instructions, the baseline's name and notes; beside official files, other instructions are refused."""
    rows = _rows(file, ("instruction", "output"))
    texts, outputs = [row["instruction"] for row in rows], [row["output"] for row in rows]
    if len(set(texts)) < len(texts):
        raise EvaluationError(f"{file}: has {len(texts) - len(set(texts))} instructions twice; get it from {SOURCE}")
    notes = []
    if _texts_sha256(texts) != INSTRUCTIONS_SHA256:
        if of_officials:
            raise EvaluationError(
                f"{file}: has {len(rows)} instructions which are not AlpacaEval's {INSTRUCTIONS} in their order, "
                f"and the tables beside it are of those; get {BASELINE} from {SOURCE}, or take them away"
            )
        notes.append(f"{file.name} has {len(rows)} instructions of its own, not AlpacaEval's {INSTRUCTIONS}")
    elif _texts_sha256(outputs) != OUTPUTS_SHA256:
        notes.append(f"{file.name} has other answers than the official {BASELINE}")
    name = str(rows[0].get("generator") or "baseline")
    return (
        tuple(Instruction(row["instruction"], str(row.get("dataset", "")), row["output"]) for row in rows),
        name,
        notes,
    )


def _read_regression(file: Path, n: int) -> tuple[GamedRows, ndarray]:
    """The rows, and the difficulties of all `n` instructions. Rows without a preference do not count, as officially."""
    rows = _table(file, ("index", "preference", "std_delta_len", "instruction_difficulty"))
    index, difficulty = (_column(rows, name, file) for name in ("index", "instruction_difficulty"))
    known = _by_index(index, difficulty, file, n)
    rows = [row for row in rows if row["preference"] not in ("", "nan", "NaN")]
    preference, gap, difficulty, index = (
        _column(rows, name, file) for name in ("preference", "std_delta_len", "instruction_difficulty", "index")
    )
    if off := int((~((preference >= 0) & (preference <= 1))).sum()):
        raise EvaluationError(f"{file}: {off} preferences are not from 0 to 1; get it from {SOURCE}")
    return GamedRows(preference, gap, difficulty, index.astype(int)), known


def _read_difficulty(file: Path, n: int) -> ndarray:
    rows = _table(file, ("instruction_difficulty",))
    first = next(iter(rows[0]))  # pandas writes an index without a name
    return _by_index(_column(rows, first, file), _column(rows, "instruction_difficulty", file), file, n)


def _by_index(index: ndarray, difficulty: ndarray, file: Path, n: int) -> ndarray:
    found = dict(zip(index.astype(int).tolist(), difficulty.tolist(), strict=True))
    if sorted(found) != list(range(n)):
        raise EvaluationError(
            f"{file}: has the difficulties of {len(found)} instructions, not of 0 to {n - 1}; get it from {SOURCE}"
        )
    return np.array([found[place] for place in range(n)])


def _table(file: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    rows = list(csv.DictReader(_text(file).splitlines()))
    lacks = [name for name in columns if not rows or name not in rows[0]]
    if lacks:
        raise EvaluationError(f"{file}: has no column {lacks[0]!r}; get it from {SOURCE}")
    return rows


def _column(rows: list[dict[str, str]], name: str, file: Path) -> ndarray:
    try:
        values = np.array([float(row[name]) for row in rows])
    except (TypeError, ValueError):
        values = np.array([math.nan])
    if not np.isfinite(values).all():
        raise EvaluationError(f"{file}: the column {name!r} holds what is no number; get it from {SOURCE}")
    return values


def _annotation(row: dict[str, Any], file: Path, place: int) -> Annotation:
    said = row.get("preference")
    number = math.nan if said is None or isinstance(said, str | bool) else float(said)
    if number == 0:
        number = TIE
    if not math.isnan(number) and not 1 <= number <= 2:
        raise EvaluationError(f"{file}, row {place}: the preference {said!r} is not from 1 to 2; leave out or mend it")
    texts = {name: row.get(name) for name in ("output_1", "output_2")}
    if lacks := next((name for name, text in texts.items() if not isinstance(text, str)), None):
        raise EvaluationError(f"{file}, row {place}: has no text in {lacks!r}; it is no annotation of a pair")
    return Annotation(
        row["instruction"],
        row["output_1"],
        row["output_2"],
        None if math.isnan(number) else number,
        *(str(row.get(name) or "") for name in ("generator_1", "generator_2", "annotator", "dataset")),
        raw=row.get("raw_completion"),
    )


def _rows(file: Path, texts: Sequence[str]) -> list[dict[str, Any]]:
    """A JSON list of objects that have these texts."""
    try:
        rows = json.loads(_text(file))
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{file}: is not JSON ({one_line(error)})") from None
    if not isinstance(rows, list) or not rows:
        raise EvaluationError(f"{file}: is no list of rows, or an empty one")
    for place, row in enumerate(rows):
        for name in texts:
            if not isinstance(row, dict) or not isinstance(row.get(name), str):
                raise EvaluationError(f"{file}, row {place}: has no text in {name!r}")
    return rows


def _text(file: Path) -> str:
    try:
        return _bytes(file).decode("utf-8-sig")
    except ValueError:
        raise EvaluationError(f"{file}: is not UTF-8 text") from None


def _bytes(file: Path) -> bytes:
    try:
        content = file.read_bytes()
        return gzip.decompress(content) if file.suffix == ".gz" else content
    except (OSError, EOFError) as error:
        raise EvaluationError(f"{file}: cannot be read ({one_line(error)})") from None


def _sha256(file: Path) -> str:
    return hashlib.sha256(_bytes(file)).hexdigest()


def _texts_sha256(texts: Sequence[str]) -> str:
    return hashlib.sha256("".join(f"{text}\0" for text in texts).encode("utf-8", "surrogatepass")).hexdigest()


def _write(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    # as escapes, JSON holds all that an answer may hold
    write_text(Path(path), json.dumps(list(rows), indent=2) + "\n")


def _beginning(text: str) -> str:
    words = " ".join(text.split())
    return repr(words if len(words) <= 60 else f"{words[:60]}…")
