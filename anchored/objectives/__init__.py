"""The alignment objectives: logps in, losses and metrics out. The functions are in `losses`.

Here stand only their names, so that checking a recipe needs no torch.
"""

from __future__ import annotations

from typing import Literal

ObjectiveName = Literal[
    "sft",
    "dpo",
    "apo-zero",
    "apo-down",
    "kto-pair",
    "kto",
    "apo-zero-unpaired",
    "ipo",
    "slic-hinge",
    "simpo",
    "orpo",
    "cpo",
    "dpop",
    "robust-dpo",
    "beta-dpo",
    "npo",
]

UNPAIRED: frozenset[ObjectiveName] = frozenset({"kto", "apo-zero-unpaired", "npo"})
"""Those that learn from single answers, good or bad. (sft, which learns winners alone, is compared with the others.)"""
