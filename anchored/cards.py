"""What the cards of models and of data sets share: names from outside made harmless, and whom to cite.

Names stand in code spans, so nothing in them is taken for markup; of a local folder or file only the last name is told.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from anchored.datasets_io.places import is_address
from anchored.runs import one_line

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")

CITATION = """\
```bibtex
@article{doosterlinck2024anchored,
  title   = {Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment},
  author  = {D'Oosterlinck, Karel and Xu, Winnie and Develder, Chris and Demeester, Thomas and Singh, Amanpreet and
             Potts, Christopher and Kiela, Douwe and Mehri, Shikib},
  journal = {arXiv preprint arXiv:2408.06266},
  year    = {2024}
}
```"""


def front_matter(header: dict[str, object]) -> str:
    """The YAML header of a card, without what is None."""
    known = {name: value for name, value in header.items() if value is not None}
    return f"---\n{yaml.safe_dump(known, sort_keys=False, allow_unicode=True)}---"


def on_hub(name: str | Path) -> bool:
    """Whether a name is a Hub id and nothing that lies here."""
    return isinstance(name, str) and bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def told(name: str | Path) -> str:
    """What to tell of a name: a Hub id whole, of a path the last part."""
    if is_address(name):
        return str(name).partition("?")[0].rstrip("/").rpartition("/")[2]
    return str(name) if on_hub(name) else Path(name).resolve().name


def code(text: str) -> str:
    """Text as a code span, whatever is in it."""
    plain = one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", plain)), default=0))
    return f"{fence} {plain} {fence}" if "`" in plain else f"`{plain}`"


def fenced(text: str, language: str) -> str:
    """Text as a block of code, whatever is in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
