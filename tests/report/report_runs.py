"""Run folders for the report's tests, made by the writers that the stages use; some texts in them mean harm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import yaml

from anchored.contrast import contrasts
from anchored.datasets_io import write_pairs
from anchored.records import Answer, Message, Outcome, Pair, Prompt, Score, prompt_id
from anchored.runs import Run, append_lines

HOSTILE = [
    "<script>window.planted = 1</script>",
    "</script><script>window.planted = 2</script>",
    "<img src=x onerror='window.planted = 3'>",
    "]]><!--<script>--><svg onload=window.planted=4>",
    "{{ 7 * 7 }} {% raw %} ${window.planted = 5} &lt;b&gt; &amp;",
    "nul \x00 bell \x07 escape \x1b[31m return \r delete \x7f",
    "line \u2028 paragraph \u2029 override \u202e backwards \u202c joiner \u200d",
    "مرحبا بالعالم, שלום עולם, 你好世界, 👩‍👩‍👧",
    "Pneumono" * 400,
    "\"quotes\" 'single' `back` \\u003cscript\\u003e javascript:alert(1)",
]


def pair(text: str, revision: str, name: str = "", **about: object) -> Pair:
    messages = (Message("user", f"Say it better: {text[:200]}"),)
    prompt = Prompt(messages, name or prompt_id(messages))
    fields = {"method": "clair", "rational": f"Because {text[:100]}", **about}
    return Pair(prompt, Answer(revision, "teacher <b>"), Answer(text, "policy & co"), **fields)  # type: ignore[arg-type]


def hostile_pairs() -> list[Pair]:
    return [
        pair(f"Well: {text} That is all.", f"Indeed: {text} That is truly all.", f"h{n}")
        for n, text in enumerate(HOSTILE)
    ]


def write_rows(path: Path, pairs: Sequence[Pair]) -> None:
    measured = contrasts(pairs)
    columns = ("jaccard", "levenshtein", "length_ratio")
    write_pairs(path, pairs, {name: [float(getattr(one, name)) for one in measured] for name in columns})


def write_recipe(run: Run, **sections: object) -> None:
    recipe = {
        "policy": {"model": "models/<i>tiny</i>"},
        "create": {"method": "clair", "prompts": {"data": "prompts.jsonl"}, "reviser": {"model": "big-teacher"}},
        "train": {
            "objective": {"name": "apo-zero", "beta": 0.1},
            "epochs": 2,
            "optimizer": {"name": "rmsprop", "lr": 2e-7},
        },
        "evaluate": {"benchmarks": ["pocket"]},
        "versions": {"python": "3.11.7"},
        **sections,
    }
    run.folder.mkdir(parents=True, exist_ok=True)
    run.recipe.write_text(yaml.safe_dump(recipe, sort_keys=False), "utf-8")


def write_created(run: Run, refused: Sequence[Pair] = ()) -> None:
    """What `create` leaves behind."""
    write_recipe(run)
    held_out = [pair(f"Apart {n} <b>", f"Apart {n} <i>", f"o{n}") for n in range(2)]
    write_rows(run.pairs, hostile_pairs())
    write_rows(run.held_out, held_out)
    write_rows(run.refused, refused)
    run.complete("create", {"seconds": 12.0})


def refused_pairs() -> list[Pair]:
    return [
        pair(
            "Too short",
            "Far, far too long for it",
            "r1",
            outcome=Outcome.LENGTH_RATIO,
            detail="2.67 <b>, not in 0.5 to 2",
        ),
        pair(
            "A plain answer",
            "The student's answer, corrected",
            "r2",
            outcome=Outcome.LEAK,
            detail="The student's answer",
        ),
        pair(
            "Alone <script>window.planted = 6</script>",
            "",
            "r3",
            outcome=Outcome.NO_HEADER,
            detail="no header in the reply",
        ),
        Pair(Prompt((), "r4"), Answer(""), Answer(""), outcome=Outcome.MALFORMED, detail="line 7: not a pair"),
    ]


def write_trained(run: Run, steps: int = 80) -> None:
    """What `train` leaves behind."""
    lines = [
        {
            "step": step,
            "epoch": step * 2 / steps,
            "pairs_seen": step * 16,
            "loss": 1.0 / step,
            "lr": 2e-7 * (1 - step / steps),
            "grad_norm": float("nan") if step == 7 else 3.0,
            "reward_margin": step / 10,
            "reward_accuracy": min(1.0, step / steps),
        }
        for step in range(1, steps + 1)
    ]
    append_lines(run.metrics, lines)
    append_lines(
        run.trajectories,
        [
            {
                "step": step,
                "epoch": step * 2 / steps,
                "logp_chosen": -30 + step / 100,
                "logp_rejected": -20 - step / 50,
                "reward_chosen": step / 1000,
                "reward_rejected": -step / 500,
            }
            for step in range(0, steps + 1, 10)
        ],
    )
    run.complete("train", {"pairs": 10, "left_out": {}, "steps": steps, "seconds": 41.0})


def scores(benchmark: str = "pocket") -> list[Score]:
    """Start and two checkpoints, overall and in two categories, the smaller category first."""
    table = {
        ("start", 0): (40.0, 20.0, 60.0),
        ("epoch-01", 40): (55.0, 60.0, 50.0),
        ("epoch-02", 80): (50.0, 40.0, 60.0),
    }
    found = []
    for (checkpoint, step), values in table.items():
        for category, n, value in zip((None, "<b>sums</b>", "dates"), (100, 40, 60), values, strict=True):
            found.append(
                Score(checkpoint, step, benchmark, "1", "grade", category, value, value - 5, value + 6, n, "judge <u>")
            )
    return found


def write_evaluated(run: Run) -> None:
    """What `evaluate` leaves behind."""
    append_lines(run.scores, map(asdict, scores()))
    gain = {"value": 15.0, "low": 8.0, "high": 21.0}
    row = {"benchmark": "pocket", "view": "grade", "n": 100, "max": gain, "mean": gain, "last": gain, "sd": 3.5}
    rows = [{**row, "category": category, "max_checkpoint": "epoch-01"} for category in (None, "dates")]
    run.complete("evaluate", {"improvement": rows, "seconds": 30.0})


def whole_run(folder: Path) -> Run:
    run = Run(folder)
    write_created(run, refused_pairs())
    write_trained(run)
    write_evaluated(run)
    return run
