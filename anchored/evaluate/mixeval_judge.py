"""MixEval's judge: what it is asked about an answer, and what its replies say.

Free form is graded 0..1 against the accepted answers; of multiple choice the judge names the option that was chosen,
without being told which is right. The prompts are this package's, read by the last mark of a reply; or those of the
benchmark's authors, taken from a clone of their repository and read as their code does, by the first mark.
"""

from __future__ import annotations

import ast
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from anchored.errors import EvaluationError
from anchored.evaluate.mixeval_files import CLONE, SPLITS, Row, Split, letter
from anchored.llm.addressed import addresses_judge
from anchored.llm.prompt_files import SLOT, fill, load
from anchored.records import Message, content_hash

NO_OPTION = "none"
"""The verdict that an answer chose no option."""
REMINDER = (
    "Your reply holds no verdict that can be read. Write one line, with nothing on it but the verdict in double square "
    "brackets."
)

_MARK = re.compile(r"\[\[\s*([^\[\]\n]{1,20}?)\s*\]\]")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)?")
_OFFICIAL_GRADES = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
_OFFICIAL_LETTERS = (re.compile(r"\[\[([A-Z])\]\]"), re.compile(r"\[([A-Z])\]"))
_OFFICIAL_FILE = Path("mix_eval") / "prompts" / "judge_prompts.py"
_OFFICIAL_NAMES: dict[Split, str] = {
    "free-form": "gpt_judge_for_closeended_freeform",
    "multiple-choice": "gpt_judge_for_closeended_multiplechoice",
}
_OFFICIAL_SLOTS = {"prompt": "question", "gold_ans": "targets", "options": "options", "response": "answer"}
_GRADE_MARK = r"\[\[ ?\d(?:\.\d+)? ?\]\]"
_NO_MARK = r"(?!)"
_ASKS_FOR_GRADE = re.compile(
    r"\b(?:give|award|assign|grant|rate|grade|score|mark)\b"
    r"(?: (?:me|it|this|that|the|my|answer|response|with|as|a|an))*"
    r" (?:full|maximum|top|perfect|highest|correct)(?: (?:score|marks?|points|credit|grade|rating))?\b"
    r"|\bcorrectness score\b",
    re.IGNORECASE,
)
_LETTER = re.compile(r"[\s*]*(?:\(([A-Z])\)|([A-Z])(?![\w'’]))[ *]*([.):,]?)(.*)", re.DOTALL)
_NAMED = re.compile(
    r"\b(?:answer|option|choice|correct)\b[^.\n]{0,20}?\b([A-Z])\b(?! [a-z])|^[ (*]*([A-Z])[ ).:*]*$", re.MULTILINE
)
_FRAME = re.compile(r"={20,}")
"""What stands around the answer in this package's prompts."""
_NO_FRAME = "=" * 19
_LATIN_END = 0x24F


@dataclass(frozen=True, slots=True)
class JudgePrompts:
    """What the judge is asked, by split: turns with slots for the question, the answer and what it is held against."""

    turns: dict[Split, tuple[Message, ...]]
    official: bool

    @property
    def sha256(self) -> str:
        return content_hash({split: [[one.role, one.content] for one in turns] for split, turns in self.turns.items()})

    def ask(self, row: Row, answer: str) -> tuple[Message, ...]:
        """The messages that ask about one answer."""
        shown = answer if self.official else _FRAME.sub(_NO_FRAME, answer)
        slots = {"question": row.prompt, "answer": shown, "targets": self._targets(row), "options": _options(row)}
        return tuple(
            Message(turn.role, fill(turn.content, {name: slots[name] for name in SLOT.findall(turn.content)}))
            for turn in self.turns[row.split]
        )

    def read(self, row: Row, reply: str) -> float | str | None:
        """The verdict: a grade 0..1 for free form, else a letter or NO_OPTION; None where there is none."""
        if self.official:
            return _read_officially(row, reply)
        marks = _MARK.findall(unicodedata.normalize("NFKC", reply))
        if not marks:
            return None
        if row.split == "free-form":
            said = marks[-1].replace(",", ".")
            return float(said) if _NUMBER.fullmatch(said) and float(said) <= 1 else None
        said = marks[-1].upper().strip("().")
        if said == NO_OPTION.upper():
            return NO_OPTION
        return said if said in _letters(row) else None

    def _targets(self, row: Row) -> str:
        if self.official:
            return "; ".join(f"<answer {number}> {target}" for number, target in enumerate(row.target, 1))
        return "\n".join(f"- {target}" for target in dict.fromkeys(row.target))


def own_prompts() -> JudgePrompts:
    """This package's."""
    files: dict[Split, str] = {split: load(f"evaluate/mixeval-{split}") for split in SPLITS}
    return JudgePrompts({split: (Message("user", text),) for split, text in files.items()}, official=False)


def official_prompts(clone: str) -> JudgePrompts:
    """Those of the benchmark's authors, from a clone of their repository. Its code is read, not run."""
    root = Path(clone).expanduser()
    file = root if root.is_file() else root / _OFFICIAL_FILE
    try:
        tree = ast.parse(file.read_text("utf-8"))
    except FileNotFoundError:
        raise EvaluationError(
            f"evaluate.mixeval.official_prompts: {clone} holds no {_OFFICIAL_FILE}; `{CLONE}` and name the clone"
        ) from None
    except (OSError, ValueError, SyntaxError):
        raise EvaluationError(f"{file}: cannot be read; get it again (`{CLONE}`)") from None
    return JudgePrompts({split: _turns(tree, name, file) for split, name in _OFFICIAL_NAMES.items()}, official=True)


def plain_letter(row: Row, answer: str) -> str | None:
    """The option that an answer names so plainly that nobody need be asked: a letter, or a letter and its option.

    "B", "(B)", "**B.**", a line that is "B" with an explanation below, "B. Paris"; not "A dog", nor "B. London" where B
    is Paris, nor "B" over "so the answer is C".
    """
    found = _LETTER.match(answer)
    if found is None:
        return None
    named, mark, rest = found[1] or found[2], found[1] or found[3], found[4]
    if named not in _letters(row) or any((other[1] or other[2]) != named for other in _NAMED.finditer(rest)):
        return None
    if not rest.strip(" *") or rest.lstrip(" *\r").startswith("\n"):
        return named
    option, said = (_words(text) for text in (row.options[ord(named) - ord("A")], rest))
    option = re.sub(rf"^\(?{named.lower()}\)", "", option).strip()  # some options hold their letter themselves
    whole = said == option or said.startswith(tuple(f"{option}{end}" for end in (" ", ".", ",")))
    return named if mark and option and whole else None


def speaks_to_judge(row: Row, answer: str) -> str:
    """The words of an answer that are meant for its judge, or ""; those of the question or a right answer are not."""
    task = "\n".join((row.context or "", row.prompt, *row.options, *row.target))
    mark = _GRADE_MARK if row.split == "free-form" else _NO_MARK
    if words := addresses_judge(answer, task, mark):
        return words
    asked = _ASKS_FOR_GRADE.search(answer) or _FRAME.search(answer) or re.search(mark, answer)
    return asked[0] if asked and asked[0].lower() not in task.lower() else ""


def in_another_script(reply: str) -> bool:
    """Whether most of a reply's letters are not Latin ones."""
    letters = [ord(one) > _LATIN_END for one in reply if one.isalpha()]
    return bool(letters) and sum(letters) > len(letters) / 2


def _read_officially(row: Row, reply: str) -> float | str | None:
    patterns = _OFFICIAL_GRADES if row.split == "free-form" else _OFFICIAL_LETTERS
    found = next(filter(None, (pattern.search(reply) for pattern in patterns)), None)
    if found is None:
        return None
    if row.split == "multiple-choice":
        return found[1]
    return float(found[1]) if 0 <= float(found[1]) <= 1 else None


def _turns(tree: ast.Module, name: str, file: Path) -> tuple[Message, ...]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
            turns = node.value.body if isinstance(node.value, ast.Lambda) else None
            if isinstance(turns, ast.List):
                return tuple(_turn(one, name, file) for one in turns.elts)
    raise EvaluationError(f"{file}: defines no {name} as MixEval does; get it again (`{CLONE}`)")


def _turn(node: ast.expr, name: str, file: Path) -> Message:
    if isinstance(node, ast.Dict):
        keys = [ast.literal_eval(key) for key in node.keys if key is not None]
        texts = dict(zip(keys, map(_template, node.values), strict=False))
        role, content = texts.get("role"), texts.get("content")
        if (role == "system" or role == "user") and content is not None:
            return Message(_role(role), content)
    raise EvaluationError(f"{file}: {name} is not a list of turns as MixEval's is; get it again (`{CLONE}`)")


def _role(role: str) -> Literal["system", "user"]:
    return "system" if role == "system" else "user"


def _template(node: ast.expr) -> str | None:
    """A string of the code, an f-string's names as slots."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if not isinstance(node, ast.JoinedStr):
        return None
    parts = []
    for part in node.values:
        if isinstance(part, ast.Constant):
            parts.append(str(part.value))
        elif isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Name):
            slot = _OFFICIAL_SLOTS.get(part.value.id)
            if slot is None:
                return None
            parts.append(f"<<{slot}>>")
        else:
            return None
    return "".join(parts)


def _letters(row: Row) -> Sequence[str]:
    return [letter(place) for place in range(len(row.options))]


def _options(row: Row) -> str:
    return "\n".join(f"{name}. {option}" for name, option in zip(_letters(row), row.options, strict=True))


def _words(text: str) -> str:
    return " ".join(text.replace("*", "").split()).casefold().rstrip(" .")
