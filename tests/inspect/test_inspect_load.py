"""100,000 pairs: the command answers, and the page holds only what is in sight."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT

from anchored.runs import Run

ROWS = 100_000


@pytest.fixture(scope="module")
def load() -> Any:
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("inspect_load", ROOT / "benchmarks" / "inspect_load.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_hundred_thousand_pairs_are_listed_searched_and_decided_about(
    browser: Any, load: Any, tmp_path: Path
) -> None:
    from playwright.sync_api import expect

    run = Run(tmp_path / "run")
    load.make_run(run, ROWS)
    with load.inspecting(run.folder) as served:
        assert served.memory() < 1500
        view = served.ask("/api/view", search=f"{load.NEEDLE.upper()} 93999.")
        (row,) = served.ask("/api/rows", view=view["view"], start=0, count=9)["rows"]
        assert served.ask("/api/pair", row=row["row"])["id"] == "pairs-93999"
        assert served.ask("/api/view", show="refused")["total"] == ROWS // 20
        alike = served.ask("/api/view", order="alike", show="training")
        entries = served.ask("/api/rows", view=alike["view"], start=0, count=200)["rows"]
        assert [one["jaccard"] for one in entries] == sorted((one["jaccard"] for one in entries), reverse=True)

        page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
        page.goto(served.address)
        expect(page.locator("#place")).to_have_text("1 of 100,000")
        page.keyboard.press("End")
        expect(page.locator(f"#row-{ROWS - 1}")).to_contain_text("length_ratio")
        assert page.locator("#list .entry").count() < 60
        page.locator("#list").evaluate("list => { list.scrollTop = 60 * 50000; }")
        expect(page.locator("#row-50003 .title")).to_contain_text("?")
        page.fill("#search", f"{load.NEEDLE} 777.")
        expect(page.locator("#count")).to_have_text("3 rows")
        expect(page.locator("#pair")).to_contain_text(f"{load.NEEDLE} 777.")
        page.evaluate("document.activeElement.blur()")
        page.keyboard.press("d")
        expect(page.locator("#progress")).to_contain_text("1 of 100,000 decided: 1 dropped")
        page.context.close()
    assert run.decisions.read_text().count("\n") == 1
