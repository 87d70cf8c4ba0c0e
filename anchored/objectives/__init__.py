"""The alignment objectives: logps in, loss and metrics out. The functions are in `losses`.

Here stand only their names, so that checking a recipe needs no torch.
"""

from __future__ import annotations

from typing import Literal

ObjectiveName = Literal["apo-zero", "apo-down", "dpo", "sft"]
