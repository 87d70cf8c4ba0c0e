"""The `anchored` command: reads arguments, calls the pipeline, shows what came out, turns errors into exit codes.

Exit codes: 0 done; 1 our fault; 2 the user's input; 3 stopped cleanly, the same command goes on.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from anchored.datasets_io.places import is_address, place_of
from anchored.datasets_io.writing import Layout
from anchored.errors import AnchoredError, RecipeError
from anchored.process import settle_environment
from anchored.progress import Silent
from anchored.runs import STAGES, Run
from anchored.train.launch import speaks, under_launcher

if TYPE_CHECKING:
    from anchored.pipeline import Batching

app = typer.Typer(
    help="Align language models with contrastive revisions (CLAIR) and anchored preference optimization (APO).",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
# a log file has no width of its own
_out = Console(width=None if sys.stdout.isatty() else 120)
_err = Console(stderr=True)

# typer's click errors: some releases of typer bring a click of their own, so the class is found through typer
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]

# what libraries would print between the lines, and send home
_QUIET = {
    "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_A_PLACE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)

_INTERRUPTED = 130  # what typer makes of Ctrl-C

Stage = Literal["create", "train", "evaluate", "report"]
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file; see recipes/.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to override.")]
Limit = Annotated[
    int | None, typer.Option(help="Use at most N prompts, and N questions of each benchmark.", metavar="N")
]
Target = Annotated[int | None, typer.Option(help="Go on until N pairs are accepted (create.target).", metavar="N")]
ByBatch = Annotated[
    bool, typer.Option("--batch", help="Ask the teacher by its endpoint's Batch API: half the price, up to a day.")
]
BatchExport = Annotated[
    bool, typer.Option("--batch-export", help="Write what is to be asked to files (vllm run-batch), then stop.")
]
BatchImport = Annotated[
    list[Path] | None,
    typer.Option("--batch-import", metavar="FILE", help="Replies to what was exported; may be given several times."),
]
CancelBatches = Annotated[
    bool, typer.Option("--cancel-batches", help="End the run's batches at the endpoint, and do nothing else.")
]
Redo = Annotated[Stage | None, typer.Option(help="Do STAGE and what follows again; paid replies are kept.")]


def _run_folder(text: str) -> Path:
    if is_address(text):
        # the rest of it may hold a login
        raise typer.BadParameter(
            f"{text.partition(':')[0]}://...: a run folder lies on a disk of this machine, for SQLite's sake; "
            "create.copy_to copies the finished pairs to an address"
        )
    return Path(text)


AnyOut = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", parser=_run_folder, help="The run folder; runs/RECIPE if left out."),
]
OutFolder = Annotated[Path, typer.Option("--out", metavar="DIR", parser=_run_folder, help="The run folder.")]


@app.command()
def demo(
    out: OutFolder = Path("runs/demo"),
    seed: Annotated[int | None, typer.Option(metavar="N", help="Another draw of prompts, samples and order.")] = None,
) -> None:
    """The pocket world, end to end: pairs, training, scores and a report in minutes, offline."""
    from anchored.pocket.world import RECIPE

    seeds = () if seed is None else (f"create.prompts.seed={seed}", f"train.seed={seed}", f"evaluate.seed={seed}")
    _run(RECIPE, seeds, out)


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    out: AnyOut = None,
    until: Annotated[Stage | None, typer.Option(help="Stop after this stage.")] = None,
    limit: Limit = None,
    target: Target = None,
    redo: Redo = None,
    batch: ByBatch = False,
) -> None:
    """All stages, from prompts to report; the same command again goes on where the last one ended."""
    from anchored.pipeline import Batching

    stages = STAGES[: STAGES.index(until) + 1] if until else STAGES
    folder = out or Path("runs") / recipe.stem
    _run(recipe, _with_target(overrides, target), folder, stages, limit, redo, Batching("submit") if batch else None)


@app.command()
def create(
    recipe: RecipePath,
    out: OutFolder,
    overrides: Overrides = None,
    limit: Limit = None,
    target: Target = None,
    redo: Redo = None,
    batch: ByBatch = False,
    batch_export: BatchExport = False,
    batch_import: BatchImport = None,
    cancel_batches: CancelBatches = False,
) -> None:
    """Prompts to preference pairs."""
    from anchored.pipeline import Batching

    if batch + batch_export + cancel_batches > 1 or (cancel_batches and batch_import):
        raise typer.BadParameter("choose one of --batch, --batch-export and --cancel-batches")
    for file in batch_import or ():
        if not file.is_file():
            raise typer.BadParameter(f"--batch-import {file}: there is no such file")
    if cancel_batches:
        _cancel_batches(recipe, overrides or (), out)
        return
    way = "submit" if batch else "export" if batch_export else "live"
    batching = Batching(way, tuple(batch_import or ()))
    _run(recipe, _with_target(overrides, target), out, ("create",), limit, redo, batching)


@app.command()
def train(
    recipe: RecipePath, out: OutFolder, overrides: Overrides = None, limit: Limit = None, redo: Redo = None
) -> None:
    """Pairs to checkpoints."""
    _run(recipe, overrides or (), out, ("train",), limit, redo)


@app.command()
def evaluate(
    recipe: RecipePath, out: OutFolder, overrides: Overrides = None, limit: Limit = None, redo: Redo = None
) -> None:
    """Checkpoints to scores."""
    _run(recipe, overrides or (), out, ("evaluate",), limit, redo)


@app.command()
def report(recipe: RecipePath, out: OutFolder, overrides: Overrides = None, limit: Limit = None) -> None:
    """The run folder as one page, report.html."""
    _run(recipe, overrides or (), out, ("report",), limit, None)


@app.command()
def contrast(
    data: Annotated[
        list[str], typer.Argument(metavar="DATA...", help="Files, folders, addresses (s3://...) or Hub ids.")
    ],
    tokenizer: Annotated[
        str, typer.Option(metavar="NAME", help="whitespace, word, or a Hugging Face tokenizer.")
    ] = "whitespace",
    split: Annotated[str | None, typer.Option(metavar="NAME", help="Which split, where the data has several.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """How far the answers of pairs differ (the paper's Table 1), over one or more data sets."""
    from dataclasses import asdict

    from anchored import contrast as measure
    from anchored.datasets_io import Refusals, stream_pairs
    from anchored.report.tables import contrast_table
    from anchored.terminal import print_table

    workers = min(measure.MOST_WORKERS, os.cpu_count() or 1)
    refused = {source: Refusals() for source in data}
    measured = {
        source: measure.contrast(stream_pairs(source, found, split=split), tokenizer, workers)
        for source, found in refused.items()
    }
    if as_json:
        print(json.dumps([{"data": source, **asdict(row)} for source, row in measured.items()], indent=1))
    else:
        print_table(_out, contrast_table(measured))
        for source, found in refused.items():
            if found.counts:
                _out.print(escape(found.told(source, measured[source].pairs)), highlight=False, soft_wrap=True)


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="A file, a folder, a run folder, an address (s3://...) or a Hub id.")
    ],
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="A file or an address that ends in .parquet, .jsonl or .jsonl.gz.")
    ],
    layout: Annotated[Layout, typer.Option(help="What to write; see docs/formats.md.")] = "trl",
    split: Annotated[str | None, typer.Option(metavar="NAME", help="Which split, where the data has several.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over what is there.")] = False,
    card: Annotated[bool, typer.Option("--card", help="Write a data set card, README.md, beside OUT.")] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Upload OUT with its card, for its owners alone.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Let everybody see what is uploaded.")] = False,
    license: Annotated[str | None, typer.Option(metavar="NAME", help="The licence that the card states.")] = None,
) -> None:
    """Pairs or unpaired answers from one layout to another; uploads them if asked to."""
    from anchored.hub.repository import Repository
    from anchored.hub.share import Publication, share
    from anchored.terminal import Terminal

    if public and not push_to_hub:
        raise typer.BadParameter("--public says who may see what is uploaded, and needs --push-to-hub ORG/NAME")
    if license and not (card or push_to_hub):
        raise typer.BadParameter("--license stands in the card, and needs --card or --push-to-hub ORG/NAME")
    to = place_of(out)
    repository = Repository(push_to_hub, public) if push_to_hub else None
    with Terminal(_out) as progress:
        publication = Publication(repository, card, license)
        shared = share(source, to, layout, publication, split=split, force=force, progress=progress)
    done = shared.converted
    told = [f"{to}: {done.written:,} rows in the layout {layout}"]
    if done.refused.counts:
        told += [done.refused.told(source, done.kept), *(f"  {line}" for line in done.refused.examples_told())]
    told += [f"left out: column {name}, {why}" for name, why in done.left_out.items()]
    told += [f"{shared.card}: its card"] if shared.card else []
    told += [f"{shared.url}: uploaded, {'for all to see' if public else 'private'}"] if shared.url else []
    for line in told:
        _out.print(escape(line), highlight=False, soft_wrap=True)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write every number, each in its own column.")
    ] = None,
    latex: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the tables for LaTeX (booktabs).")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with tables and plots.")] = None,
    view: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Show this view of benchmarks that have it; may be given several times."),
    ] = None,
    each: Annotated[bool, typer.Option("--each", help="A row for every run, also where only seeds differ.")] = False,
    intervals: Annotated[bool, typer.Option(help="Show 95 % intervals in the terminal and in LaTeX.")] = True,
) -> None:
    """Runs side by side (the paper's Tables 2, 4 and 5): what each data set and objective gained, and what differs."""
    from anchored.recipe import shaping
    from anchored.report import compare as runs_of
    from anchored.report.compare_files import Outputs, check_outputs, write_outputs
    from anchored.report.compare_tables import terminal_tables
    from anchored.report.differences import differences
    from anchored.terminal import print_table

    outputs = Outputs(csv, latex, html)
    check_outputs(outputs)
    found = runs_of.compare(runs, shaping, view or (), each=each)
    between = differences(found)
    tables = terminal_tables(found, between, intervals=intervals)
    for table in tables:
        print_table(_out, table)
    for note in (*found.notes, *between.notes):
        _say(note)
    for one in found.left_out:
        _say(f"Not compared: {one}")
    for path in write_outputs(found, between, outputs, intervals=intervals):
        _say(f"Written: {path}")


@app.command()
def inspect(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="A run folder, a file, a folder, an address (s3://...) or a Hub id.")
    ],
    decisions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where decisions go; else into the run folder or beside DATA.")
    ] = None,
    port: Annotated[int, typer.Option(metavar="N", help="0: a free one.", min=0, max=65535)] = 0,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
    split: Annotated[str | None, typer.Option(metavar="NAME", help="Which split, where the data has several.")] = None,
    write: Annotated[
        str | None, typer.Option(metavar="OUT", help="Write DATA as decided, to parquet or JSONL, and end.")
    ] = None,
) -> None:
    """A page on this machine to look at pairs, search them, and keep, drop or edit them."""
    from anchored.inspect import app as page
    from anchored.terminal import Terminal

    asked = page.Inspection(data, decisions, split, port, browser)
    if write is not None:
        page.write_decided(asked, place_of(write), _say)
        return
    with Terminal(_err) as progress:
        session = page.open_session(asked, progress)
    page.serve(session, asked, _say)


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    out: AnyOut = None,
    limit: Limit = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a recipe, its data, benchmarks, endpoints and keys; estimate memory, disk and time; change nothing."""
    from dataclasses import asdict

    from anchored import recipe as recipes
    from anchored.plan import make_plan, plan_tables
    from anchored.terminal import print_table

    if limit is not None:
        overrides = [*(overrides or ()), f"limit={limit}"]
    made = make_plan(recipes.load(recipe, overrides or ()), out or Path("runs") / recipe.stem)
    if as_json:
        print(json.dumps(asdict(made), indent=1))
    else:
        for table in plan_tables(made):
            print_table(_out, table)
        for note in made.notes:
            _say(note)
    if unanswered := [one for one in made.asked if one.problem]:
        for one in unanswered:
            _complain(f"{one.role}: {one.problem}")
        raise typer.Exit(2)


@app.command()
def merge_replies(
    into: Annotated[Path, typer.Argument(metavar="INTO", help="A run folder, or its replies.sqlite.")],
    others: Annotated[list[Path], typer.Argument(metavar="FROM...", help="Others, which stay as they are.")],
) -> None:
    """Add the replies of other runs or machines, or of a damaged file, to a run's; they are no spending of this run."""
    from anchored.llm.replies import ReplyStore

    def store(path: Path) -> Path:
        return path if path.suffix == ".sqlite" or path.is_file() else Run(path).replies

    with ReplyStore(store(into)) as kept:
        for other in others:
            merged = kept.merge(store(other))
            told = f"{store(other)}: {merged.added} replies added, {merged.known} known already"
            told += "; the file is damaged, and the rest of it cannot be read" if merged.damaged else ""
            _out.print(escape(told), highlight=False, soft_wrap=True)


@app.command()
def schema() -> None:
    """JSON Schema of a recipe, for editors."""
    from anchored import recipe as recipes

    print(json.dumps(recipes.schema(), indent=1))


def main() -> None:
    """Entry point: whatever happens ends in an exit code and, if it is an error, one line that says what to do."""
    settle_environment()
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a script put us in the background: no Ctrl-C is ours
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _end_as_by_ctrl_c)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup has it ignored
        signal.signal(signal.SIGHUP, _end_as_by_ctrl_c)
    code = _exit_code()
    if under_launcher():
        # the end of an interpreter that ran collectives was seen to abort, which would pass for a failure
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _end_as_by_ctrl_c(*_: object) -> None:
    """A job manager's SIGTERM, or the end of the terminal, is as clean an end as Ctrl-C."""
    signal.raise_signal(signal.SIGINT)
    # where it was blocked it has waited, as one with those that came before
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _exit_code() -> int:
    try:
        result = app(standalone_mode=False)
        if result == _INTERRUPTED:
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except AnchoredError as error:
        _complain(str(error))
        return error.exit_code
    except _UsageError as error:
        if not str(error):  # no arguments at all: the help was shown
            return 0
        # its own text names neither the option nor the argument
        text = error.format_message() if hasattr(error, "format_message") else str(error)  # type: ignore[attr-defined]
        _complain(f"{text.replace('Value error, ', '').rstrip('.')}; see anchored --help")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        _complain("interrupted; the same command goes on from here")
        return 3
    except Exception as error:
        if isinstance(error, OSError) and (code := _exit_code_of_the_disk(error)) is not None:
            return code
        traceback.print_exc()
        _complain(
            "this is a fault of anchored, not yours; the run folder is intact. Please report it with the lines above"
        )
        return 1


def _exit_code_of_the_disk(error: OSError) -> int | None:
    """What the place that one writes to is to blame for; None where it is our fault."""
    if error.errno == errno.EPIPE:  # whoever read our output has enough: `anchored schema | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if error.errno in _NOT_A_PLACE and error.filename:
        _complain(f"{error.filename}: {error.strerror}; choose another place, or make this one a writable folder")
        return 2
    if error.errno in _DISK_FULL:
        place = f" for {error.filename}" if error.filename else ""
        _complain(f"no space left on the disk{place}; free some, and the same command goes on from here")
        return 2
    return None


def _say(text: str) -> None:
    _out.print(escape(text), highlight=False, soft_wrap=True)


def _complain(text: str) -> None:
    for line in text.splitlines() or [""]:
        _err.print(f"[bold red]error:[/] {escape(line)}", highlight=False, soft_wrap=True)


def _with_target(overrides: Sequence[str] | None, target: int | None) -> list[str]:
    return [*(overrides or ()), *([] if target is None else [f"create.target={target}"])]


def _run(
    path: Path,
    overrides: Sequence[str],
    out: Path,
    stages: Sequence[str] = STAGES,
    limit: int | None = None,
    redo: str | None = None,
    batching: Batching | None = None,
) -> None:
    from anchored import recipe as recipes
    from anchored.pipeline import Batching, Plan, execute
    from anchored.terminal import Terminal

    if limit is not None:
        overrides = [*overrides, f"limit={limit}"]
    plan = Plan(recipes.load(path, overrides), out, stages, redo, batching or Batching())
    if redo is not None and redo not in stages:
        raise RecipeError(f"--redo {redo}: this command does {', '.join(stages)} only")
    if not speaks():
        execute(plan, Silent())
        return
    with Terminal(_out) as progress:
        progress.note(f"{', '.join(stages)} in {out}")
        finished = execute(plan, progress)
    _show(finished, stages)


def _cancel_batches(path: Path, overrides: Sequence[str], out: Path) -> None:
    from anchored import recipe as recipes
    from anchored.pipeline import Plan, cancel
    from anchored.terminal import Terminal

    with Terminal(_out) as progress:
        cancel(Plan(recipes.load(path, overrides), out), progress)


def _show(run: Run, stages: Sequence[str]) -> None:
    from anchored.report.run_tables import run_tables
    from anchored.terminal import print_table

    for table in run_tables(run, stages):
        print_table(_out, table)
    if run.report.exists() and "report" in stages:
        _out.print(f"\nReport: {run.report.resolve()}", highlight=False, soft_wrap=True)
