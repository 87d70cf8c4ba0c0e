from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from anchored.report.tables import Table
from anchored.terminal import Terminal, print_table

TABLE = Table(
    "Scores [bold]of[/] a run",
    ("checkpoint", "score", "95 % interval", "addition", "counting rows", "what it means"),
    (
        ("start", "44.0", "38.7 to 49.3", "51.7", "46.7", "a sentence of several words [red]as it stands[/]"),
        ("epoch-01", "75.3", "70.7 to 80.3", "98.3", "73.3", "x"),
    ),
)


def printed(width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_table(console, TABLE)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [30, 45, 60, 80, 120])
def test_no_word_of_a_table_is_cut_at_any_width(width: int) -> None:
    text = printed(width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    cells = {*TABLE.columns, *(cell for row in TABLE.rows for cell in row)}
    for word in (word for cell in cells for word in cell.split()):
        assert word in text
    # each part says whose numbers these are
    assert text.count("epoch-01") == text.count("┡")


def test_every_part_of_a_wide_table_says_whose_numbers_it_has() -> None:
    names = ("clair", "apo-zero")
    table = Table(
        "T", ("data", "objective", *"abcdef"), ((*names, *(f"+1.2{n}[+0.1,+2.0]" for n in range(6))),), names=2
    )
    console = Console(file=io.StringIO(), width=60, color_system=None)
    print_table(console, table)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    parts = text.count("┡")
    assert parts > 1
    assert [text.count(name) for name in (*names, "objective")] == [parts] * 3
    assert [text.count(f"+1.2{n}") for n in range(6)] == [1] * 6
    assert text.count("T  ") == 1


def test_a_cell_of_two_lines_takes_no_more_room_than_its_longer_line() -> None:
    table = Table("T", ("row", "gain"), (("a", "+1.25\n[+0.5,+2.0]"), ("b", "+0.50\n[-0.5,+1.5]")))
    console = Console(file=io.StringIO(), width=80, color_system=None)
    print_table(console, table)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines[1:])) == len("│ row │ [+0.5,+2.0] │")
    assert "│     │ [+0.5,+2.0] │" in lines


def test_in_a_log_a_task_leaves_one_line_without_control_codes() -> None:
    console = Console(file=io.StringIO(), width=120)
    with Terminal(console) as progress:
        progress.start("train", total=3)
        for _ in range(3):
            progress.advance("train", loss=0.5)
        progress.finish("train")
        progress.note("[1] is no markup")
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "  train: 3/3 in 0 s  loss 0.5\n[1] is no markup\n"


def test_in_a_log_a_long_note_is_one_line() -> None:
    console = Console(file=io.StringIO(), width=40)
    with Terminal(console) as progress:
        progress.note("a row was refused, and " * 5)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().count("\n") == 1


def test_in_a_long_log_lines_tell_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("anchored.terminal.time", SimpleNamespace(monotonic=lambda: clock[0]))
    console = Console(file=io.StringIO(), width=120)
    with Terminal(console) as progress:
        progress.start("train", total=12, done=6)
        clock[0] += 61
        progress.advance("train", **{"loss": 0.5, "pairs/s": 8.213, "tokens/s": 12345.6})
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "  train: 7/12 in 61 s, 305 s left  loss 0.5  pairs/s 8.21  tokens/s 12,346\n"


def test_on_a_screen_of_80_columns_all_of_training_is_seen() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with Terminal(console) as progress:
        progress.start("train", total=12_345, done=1_000)
        progress.advance("train", **{"loss": 0.91234, "margin": -0.1234, "pairs/s": 8.213, "tokens/s": 12345.6})
        progress._bars.refresh()
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "1001/12345" in shown
    assert "eta" in shown
    assert "loss 0.912  margin -0.123  pairs/s 8.21  tokens/s 12,346" in shown
    assert "…" not in shown
