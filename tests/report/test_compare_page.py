"""The comparison's page in a real browser, and the real command."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import anchored
from compared_runs import JUDGE, known_run, recipe
from test_compare import plain_grades

from anchored.recipe import shaping
from anchored.report.compare import compare
from anchored.report.compare_page import comparison_page
from anchored.report.differences import differences

HOSTILE = "<img src=x onerror='window.planted = 1'><script>window.planted = 2<"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs that differ in objective, and one by another judge; what can be hostile is."""
    root = tmp_path_factory.mktemp("runs")
    settings = {
        "a": recipe(HOSTILE, "apo-zero"),
        "b": recipe("clair", HOSTILE),
        f"c {HOSTILE}": recipe("clair", "kto", policy__model=HOSTILE),
        "d": recipe("clair", "dpo"),
    }
    judges = dict.fromkeys(settings, JUDGE) | {"d": HOSTILE}
    return [
        known_run(
            root / name, one, plain_grades(0.4, 0.1 * n, 0.1 * n + 0.1, seed=n), judge=judges[name], chosen=["epoch-01"]
        ).folder
        for n, (name, one) in enumerate(settings.items())
    ]


@pytest.fixture(scope="module")
def page_path(folders: list[Path]) -> Path:
    found = compare([*folders, folders[0].parent / HOSTILE], shaping)
    path = folders[0].parent / "compared.html"
    path.write_text(comparison_page(found, differences(found)), "utf-8")
    return path


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (420, "dark")])
def test_the_page_shows_everything_and_runs_nothing(browser: Any, page_path: Path, width: int, scheme: str) -> None:
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    said: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(page_path.as_uri())
    text = page.inner_text("body")
    planted = page.evaluate("window.planted")
    elements = page.evaluate("document.querySelectorAll('img, script, iframe').length")
    overflow = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    bars = page.evaluate("document.querySelectorAll('.bar-row').length")
    page.context.close()
    assert (planted, elements, overflow, said) == (None, 0, 0, [])
    assert [url for url in requests if not url.startswith("file:")] == []
    assert "4 runs compared" in text
    assert text.count(HOSTILE) >= 4
    assert "start from 2 models" in text
    assert "no such folder" in text
    assert "cannot be told" in text or "yes" in text
    assert bars == 4


def test_the_dots_stand_where_the_numbers_are(browser: Any, page_path: Path) -> None:
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    page.goto(page_path.as_uri())
    drawn = page.evaluate(
        """[...document.querySelectorAll('.forest')[0].querySelectorAll('.bar-row')].map((row) => {
            const middle = (one) => { const box = row.querySelector(one).getBoundingClientRect();
                return box.left + box.width / 2; };
            return [parseFloat(row.querySelector('.points').textContent.replace('−', '-')), middle('.dot'),
                row.querySelector('.zero').getBoundingClientRect().left];
        })"""
    )
    page.context.close()
    scales = [(dot - zero) / points for points, dot, zero in drawn if abs(points) > 1]
    assert len(scales) >= 2
    assert scales == pytest.approx([scales[0]] * len(scales), rel=0.05)


def test_the_command_prints_tables_and_writes_every_file(folders: list[Path], tmp_path: Path) -> None:
    out = {kind: tmp_path / "new" / f"t.{kind}" for kind in ("csv", "tex", "html")}
    done = anchored(
        "compare", *folders, tmp_path / "nowhere", "--csv", out["csv"], "--latex", out["tex"], "--html", out["html"]
    )
    assert (done.code, done.err) == (0, "")
    assert "Improvement on the starting model" in done.out
    assert "Differences: quiz (a), mean over checkpoints" in done.out
    assert f"Not compared: {tmp_path / 'nowhere'}: no such folder" in done.out
    assert done.out.count("Written: ") == 4
    with open(tmp_path / "new/t-differences.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 2 * 3
    assert out["tex"].read_text().startswith("% Made by `anchored compare`")
    assert "<h1>4 runs compared</h1>" in out["html"].read_text()
    bare = anchored("compare", *folders, "--no-intervals", "--each")
    assert "±" not in bare.out
    assert "intervals over questions" not in bare.out


def test_the_command_says_what_is_wrong(folders: list[Path], tmp_path: Path) -> None:
    nothing = anchored("compare", tmp_path)
    assert nothing.code == 2
    assert nothing.err.count("error:") == 1
    assert "not a run folder" in nothing.err
    view = anchored("compare", folders[0], "--view", "strict")
    assert view.code == 2
    assert "--view strict" in view.err
    for option in ("--csv", "--latex", "--html"):
        over = anchored("compare", folders[0], option, folders[1])
        assert (over.code, "is a folder" in over.err, over.out) == (2, True, "")
    assert (folders[1] / "recipe.yaml").exists()
    twice = anchored("compare", folders[0], "--csv", tmp_path / "x", "--html", tmp_path / "x")
    assert (twice.code, "the same file" in twice.err) == (2, True)


def test_comparing_needs_no_torch(folders: list[Path]) -> None:
    code = (
        "import sys; from pathlib import Path; from anchored.recipe import shaping; "
        "from anchored.report import compare, compare_files, differences; "
        f"c = compare.compare([Path({str(folders[0])!r})], shaping); "
        "compare_files.write_outputs(c, differences.differences(c), compare_files.Outputs()); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'datasets', 'pandas')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
