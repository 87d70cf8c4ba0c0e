"""Run folders to compare, with known numbers: the paper's tables, and runs whose resamples come from known grades."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from anchored.records import Score
from anchored.runs import Run, write_lines

ME_0601, ME_0811, ALPACA = "mixeval-hard/2024-06-01", "mixeval-hard/2024-08-11", "alpaca-eval"
JUDGE = "gpt-4o-mini, prompts 1f2e3d4c, temperature 0"

# Table 2 of the paper: data set, objective, then max, mean and sd on both versions, LC-AlpacaEval and length
TABLE_2 = """\
judge-off-policy,dpo,1.10,-0.74,1.15,4.30,2.85,0.75,2.94,-158
judge-off-policy,kto-pair,-1.00,-2.89,0.96,4.05,1.18,1.67,-5.69,-437
judge-off-policy,sft,-1.95,-1.63,1.06,2.85,0.42,1.20,-22.29,12669
judge-off-policy,apo-zero,0.80,-1.99,1.23,4.65,1.26,1.62,-2.42,-395
judge-off-policy,apo-down,2.70,0.64,0.98,4.80,3.52,0.85,2.40,-203
judge-on-policy,dpo,4.00,0.56,1.61,5.20,2.71,1.41,4.98,341
judge-on-policy,kto-pair,2.45,-0.51,1.26,5.05,1.13,1.70,3.02,452
judge-on-policy,sft,0.65,-0.91,1.01,4.20,2.55,0.70,1.34,156
judge-on-policy,apo-zero,4.65,0.02,1.66,5.35,2.19,1.28,5.51,484
judge-on-policy,apo-down,3.65,1.60,0.95,4.25,3.06,0.76,7.63,386
clair,dpo,0.55,-1.68,1.73,5.05,2.77,1.40,2.65,966
clair,kto-pair,2.15,0.79,0.98,4.65,2.92,0.86,4.33,160
clair,sft,0.95,-1.63,1.03,2.70,0.92,1.21,-0.47,6108
clair,apo-zero,7.65,2.93,1.98,5.95,4.39,0.89,5.08,520
clair,apo-down,-1.05,-5.22,1.55,-1.20,-3.61,1.05,-6.30,2559
stronger-preferred,dpo,-5.00,-6.94,1.03,-3.10,-4.40,0.98,-2.89,597
stronger-preferred,kto-pair,-1.20,-5.21,1.27,2.25,0.50,1.13,0.71,153
stronger-preferred,sft,2.45,0.49,1.31,5.05,2.73,1.21,6.99,1883
stronger-preferred,apo-zero,-1.70,-2.72,1.40,-4.85,-12.02,5.38,0.89,243
stronger-preferred,apo-down,-6.50,-12.51,4.97,1.65,0.16,1.22,1.87,10001
"""
# Table 5: the same without AlpacaEval, and with the hours, minutes and seconds of training
TABLE_5 = """\
judge-off-policy,kto,2.10,-2.70,1.67,4.75,1.31,1.61,19:18:10
judge-off-policy,apo-zero-unpaired,-0.40,-3.67,1.68,4.35,0.66,1.44,12:32:58
judge-on-policy,kto,3.50,1.28,1.11,4.85,2.70,1.35,19:40:10
judge-on-policy,apo-zero-unpaired,4.35,1.31,1.44,5.60,3.92,0.99,13:49:55
clair,kto,3.75,1.47,1.39,5.80,4.12,1.09,17:33:24
clair,apo-zero-unpaired,1.40,-1.49,1.77,3.20,1.13,1.21,12:31:03
stronger-preferred,kto,-3.25,-4.73,1.01,0.30,-1.18,0.75,19:07:29
stronger-preferred,apo-zero-unpaired,-2.70,-4.57,1.32,2.95,0.50,1.25,12:38:49
"""
# Table 4: split, questions, the starting model, then the best run of clair, judge-on-policy, judge-off-policy, stronger
TABLE_4 = """\
TriviaQA,267,34.30,49.20,42.40,43.70,39.80
MMLU,231,43.70,39.00,42.00,36.80,34.60
DROP,167,50.20,58.70,64.30,64.90,58.90
AGIEval,71,31.00,38.00,38.00,39.40,38.00
HellaSwag,61,29.50,37.70,26.20,29.50,27.90
CommonsenseQA,50,60.00,72.00,60.00,48.00,58.00
BoolQ,37,40.50,45.90,32.40,21.60,27.00
GSM8k,22,60.00,80.00,69.50,63.20,84.10
SIQA,20,45.00,50.00,40.00,15.00,40.00
MATH,16,47.50,63.70,51.30,58.80,73.10
BBH,16,51.30,68.80,57.50,60.60,66.90
OpenBookQA,8,62.50,62.50,50.00,62.50,75.00
GPQA,8,12.50,25.00,25.00,25.00,37.50
PIQA,8,50.00,62.50,62.50,62.50,75.00
ARC,4,0.00,0.00,0.00,0.00,0.00
MBPP,2,0.00,0.00,0.00,0.00,0.00
"""
BEST = {"clair": "apo-zero", "judge-on-policy": "apo-zero", "judge-off-policy": "apo-down", "stronger-preferred": "sft"}
START_0601 = 41.45


def table(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text)))


def recipe(method: str, objective: str, **keys: Any) -> dict[str, Any]:
    """A resolved recipe as far as comparing reads it; `keys` are dotted, with two underscores for the dot."""
    settings: dict[str, Any] = {
        "policy": {"model": "meta-llama/Meta-Llama-3-8B-Instruct"},
        "create": {"method": method, "prompts": {"data": "openbmb/UltraFeedback", "seed": 0}, "sample": {"top_p": 1.0}},
        "train": {
            "data": None,
            "objective": {"name": objective, "beta": 0.1},
            "epochs": 18,
            "optimizer": {"lr": 2e-7},
            "seed": 0,
            "device": "auto",
        },
        "evaluate": {"benchmarks": [ME_0601], "checkpoints": "all", "sample": {"temperature": 0.0}, "seed": 0},
        "limit": None,
        "versions": {"python": "3.11.7"},
    }
    for key, value in keys.items():
        *parents, last = key.split("__")
        section = settings
        for parent in parents:
            section = section[parent]
        section[last] = value
    return settings


def around(value: float, reach: float = 2.0) -> dict[str, float]:
    return {"value": value, "low": value - reach, "high": value + reach}


def improvement(benchmark: str, view: str, most: float, mean: float, sd: float, **about: Any) -> dict[str, Any]:
    return {
        "benchmark": benchmark,
        "view": view,
        "category": None,
        "n": 1000,
        "max": around(most, 3.0),
        "max_checkpoint": "epoch-07",
        "mean": around(mean),
        "sd": sd,
        "last": around(mean),
        "changes": {},
        **about,
    }


def write_run(
    folder: Path, settings: Mapping[str, Any], scores: Sequence[Score], summary: Mapping[str, Any], seconds: float = 60
) -> Run:
    run = Run(folder)
    folder.mkdir(parents=True)
    run.recipe.write_text(yaml.safe_dump(dict(settings), sort_keys=False), "utf-8")
    run.complete("train", {"steps": 100, "seconds": seconds})
    write_lines(run.scores, map(asdict, scores))
    run.complete("evaluate", {"checkpoints": ["start", "epoch-07"], "improvement": [], **summary})
    return run


def scored(benchmark: str, view: str, start: float, best: float, **about: Any) -> list[Score]:
    """The starting model and the best checkpoint."""
    known = {"version": "55167abde842", "category": None, "n": 1000, "judge": JUDGE, **about}
    return [
        Score(
            checkpoint=name,
            step=step,
            benchmark=benchmark,
            view=view,
            score=score,
            low=score - 3,
            high=score + 3,
            **known,
        )
        for name, step, score in (("start", 0, start), ("epoch-07", 700, best))
    ]


def paper_run(root: Path, line: Sequence[str]) -> Run:
    """One line of Table 2 or 5 as a run."""
    method, objective, *numbers = line
    most, mean, sd, most_later, mean_later, sd_later = map(float, numbers[:6])
    scores = [
        *scored(ME_0601, "official", START_0601, START_0601 + most),
        *scored(ME_0811, "official", 40.5, 40.5 + most_later, version="478452689 2f8"),
    ]
    rows = [
        improvement(ME_0601, "official", most, mean, sd),
        improvement(ME_0811, "official", most_later, mean_later, sd_later),
    ]
    summary: dict[str, Any] = {"checkpoints": ["start", *(f"epoch-{n:02}" for n in range(1, 19))], "improvement": rows}
    seconds = 0.0
    if len(numbers) == 8:
        gain, longer = float(numbers[6]), float(numbers[7])
        view = "length-controlled"
        scores += scored(ALPACA, view, 22.92, 22.92 + gain, version="805", n=805)
        rows.append(improvement(ALPACA, view, gain + 1, gain, 1.0, n=805))
        names = ["epoch-06", "epoch-07"]
        chosen = {"on": ME_0601, "on_view": "official", "checkpoints": names, "benchmark": ALPACA, "view": view}
        summary["chosen"] = [{**chosen, "n": 805, "left_out": 0, "gain": around(gain)}]
        summary["lengths"] = {ALPACA: {"start": 2000.0, "epoch-06": 1990.0 + longer, "epoch-07": 2010.0 + longer}}
        summary["length_changes"] = {ALPACA: {"epoch-06": around(longer - 10, 90), "epoch-07": around(longer + 10, 90)}}
    else:
        hours, minutes, rest = map(int, numbers[6].split(":"))
        seconds = 3600 * hours + 60 * minutes + rest
    if method in BEST and BEST[method] == objective:
        column = list(BEST).index(method)
        for split, n, start, *bests in table(TABLE_4):
            scores += scored(ME_0601, "official", float(start), float(bests[column]), category=split, n=int(n))
            rows.append(improvement(ME_0601, "official", 1.0, 0.0, 1.0, category=split, n=int(n)))
    return write_run(root / f"{method}-{objective}", recipe(method, objective), scores, summary, seconds)


def paper_runs(root: Path) -> list[Path]:
    return [paper_run(root, line).folder for line in [*table(TABLE_2), *table(TABLE_5)]]


@dataclass(frozen=True)
class Known:
    """A run whose every grade is known."""

    folder: Path
    grades: np.ndarray
    """[checkpoints, items], the starting model's first, 0 to 1."""
    draws: np.ndarray
    """[resamples, items]: which items each resample holds."""

    def gains(self, checkpoints: Sequence[int]) -> np.ndarray:
        """The improvement in each resample of the mean over checkpoints, in points, by plain loops."""
        told = []
        for draw in self.draws:
            means = [100 * sum(row[item] for item in draw) / len(draw) for row in self.grades.tolist()]
            told.append(sum(means[place] - means[0] for place in checkpoints) / len(checkpoints))
        return np.array(told)


def known_run(
    folder: Path,
    settings: Mapping[str, Any],
    grades: np.ndarray,
    *,
    seed: int = 0,
    resamples: int = 200,
    chosen: Sequence[str] = (),
    left_out: int = 0,
    judge: str = JUDGE,
    version: str = "v1",
) -> Known:
    """A run with scores, summary and resamples from grades [checkpoints, items]; draws come from the seed alone."""
    rng = np.random.default_rng(seed)
    items = grades.shape[1]
    draws = rng.integers(0, items, (resamples, items))
    names = ["start", *(f"epoch-{n:02}" for n in range(1, len(grades)))]
    drawn = 100 * grades[:, draws].mean(axis=2).T
    whole = 100 * grades.mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    scores = [
        Score(name, n, "quiz", version, "grade", None, float(whole[n]), float(low[n]), float(high[n]), items, judge)
        for n, name in enumerate(names)
    ]
    gain, off = whole[1:] - whole[0], drawn[:, 1:] - drawn[:, :1]

    def interval(value: float, resampled: np.ndarray) -> dict[str, float]:
        ends = np.quantile(resampled, [0.025, 0.975])
        return {"value": float(value), "low": float(ends[0]), "high": float(ends[1])}

    best = int(gain.argmax())
    row = {
        **improvement("quiz", "grade", 0, 0, float(gain.std(ddof=1)) if len(gain) > 1 else 0.0, n=items),
        "max": interval(gain[best], off[:, best]),
        "max_checkpoint": names[1 + best],
        "mean": interval(gain.mean(), off.mean(axis=1)),
        "last": interval(gain[-1], off[:, -1]),
    }
    summary: dict[str, Any] = {"checkpoints": names, "improvement": [row]}
    if chosen:
        places = [names.index(name) - 1 for name in chosen]
        about = {"on": "other", "on_view": "grade", "benchmark": "quiz", "view": "grade", "n": items}
        of_chosen = interval(gain[places].mean(), off[:, places].mean(axis=1))
        summary["chosen"] = [{**about, "checkpoints": [*chosen], "left_out": left_out, "gain": of_chosen}]
    run = write_run(folder, settings, scores, summary)
    key = "quiz\tgrade"
    meta = {"checkpoints": names, "draws": {key: f"{items} items, seed {seed}, {resamples}"}}
    packed = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
    with open(run.folder / "resamples.npz", "wb") as file:
        np.savez(file, **{key: drawn, "meta": packed})
    return Known(run.folder, grades, draws)
