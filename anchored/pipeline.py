"""The order of the stages, and what each is handed: its own settings, its inputs, and the chats that answer for it.

The only file that knows how the stages follow one another. A complete stage is skipped; one that was cut short goes on
where it was. Names such as `pocket` are looked up in the tables at the top, so the pocket world takes part as any
model, data set, server or benchmark does.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from anchored import datasets_io
from anchored import recipe as recipes
from anchored.create.copying import check_copy, copy_pairs
from anchored.create.decontaminate import decontaminator
from anchored.create.desk import check_settings
from anchored.create.on_ray import cluster
from anchored.create.ray_hub import Order
from anchored.create.settings import POLICY, CreateSettings
from anchored.create.stage import ByBatch, create
from anchored.create.templates import templates
from anchored.datasets_io.places import check_folder, place_of
from anchored.errors import AnchoredError, DataError, EvaluationError, ModelError, RecipeError
from anchored.evaluate.alpaca_eval import AlpacaEval
from anchored.evaluate.benchmark import Benchmark, Examining, Item
from anchored.evaluate.harness import Harness
from anchored.evaluate.mixeval_files import versions
from anchored.evaluate.mixeval_hard import MixEvalHard
from anchored.evaluate.questions import Questions
from anchored.evaluate.settings import EvaluateSettings
from anchored.evaluate.stage import Checkpoint, check_benchmarks, evaluate
from anchored.llm.alike import WatchedChat
from anchored.llm.batch_api import BatchApi
from anchored.llm.batch_endpoint import cancel_batches
from anchored.llm.batch_files import BatchFolder
from anchored.llm.batches import BatchChat, Means, Way
from anchored.llm.bodies import fingerprint
from anchored.llm.chat import Chat, Reply, Request
from anchored.llm.connection import Connection
from anchored.llm.endpoints import Endpoints, open_endpoints
from anchored.llm.model_folder import model_folder
from anchored.llm.money import Purse
from anchored.llm.openai_chat import OpenAIChat
from anchored.llm.replies import Remembered, ReplyStore
from anchored.llm.serve import Served, find_program
from anchored.llm.served_chat import ServedChat
from anchored.llm.settings import EndpointSettings, Engine, LocalSampling, Sampling, ServedSampling
from anchored.llm.shared import Books
from anchored.pocket import world
from anchored.progress import Progress
from anchored.recipe import Recipe
from anchored.records import START, STRONGER, Answer, Message, TrainingRow, user_prompt
from anchored.runs import STAGES, Run
from anchored.train.launch import launched, under_launcher
from anchored.trial import take_limit, widen_evaluation


class Server(Protocol):
    """Something that answers at a base URL while its block lasts."""

    base_url: str


MODELS: Mapping[str, Callable[[], Path]] = {"pocket": world.policy_folder}
PROMPTS: Mapping[str, Callable[..., datasets_io.PromptRows]] = {"pocket": world.prompts}
SERVERS: Mapping[str, Callable[[], AbstractContextManager[Server]]] = {"pocket": world.teacher}
BENCHMARKS: Mapping[str, Callable[[EvaluateSettings], Benchmark]] = {
    "pocket": lambda _: world.PocketBenchmark(),
    **{f"mixeval-hard/{version}": partial(MixEvalHard, version) for version in versions()},
    "alpaca-eval": AlpacaEval,
}


_DECIDED = "; people have decided about pairs since then, --redo create applies it"
_TRIAL = user_prompt("Is water wet?", id="trial of the template"), (Answer("It is."),)


@dataclass(frozen=True, slots=True)
class Batching:
    """By which way the teacher's replies come: request by request, but for what is in batches already."""

    way: Way = "live"
    imports: Sequence[Path] = ()
    """Files of replies to what was exported."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What one command does: which stages of which recipe in which folder."""

    recipe: Recipe
    folder: Path
    stages: Sequence[str] = STAGES
    redo: str | None = None
    """Do this stage and the ones after it again, also where the recipe changed."""
    batching: Batching = Batching()


def execute(plan: Plan, progress: Progress) -> Run:
    """Run the stages that are not complete yet; the same plan again goes on where this one ended.

    Raises an AnchoredError; whatever it is, the run folder stays usable.
    """
    run = Run(plan.folder)
    if under_launcher():
        _train_with_others(run, plan, progress)
        return run
    with run.lock():
        _begin(run, plan, progress)
        _check(run, plan, progress)
        for stage in plan.stages:
            if stage != "report" and run.summary(stage) is not None:
                progress.note(f"{stage}: complete{_changed_since(run, plan.recipe) if stage == 'create' else ''}")
            else:
                _STAGES[stage](run, plan, progress)
            if stage == "create" and (folder := _copy_to(plan.recipe)):
                copy_pairs(run, folder, progress)
    return run


def cancel(plan: Plan, progress: Progress) -> None:
    """End the batches of the plan's run at their endpoints, and do nothing else."""
    run = Run(plan.folder)
    if not run.batches.is_dir():
        raise DataError(f"{run.batches}: there is no such folder, so this run has no batches; correct --out")
    asked = {fingerprint(one): one for one in _batchable(plan.recipe.create).values()}
    with run.lock("interrupt it first, then this command ends the batches that it followed"):
        asyncio.run(cancel_batches(BatchFolder(run.batches), asked, progress))


def _train_with_others(run: Run, plan: Plan, progress: Progress) -> None:
    """Do the train stage as one of the ranks that a launcher started; the first alone readies the run folder."""
    from anchored.train.policy import find_device
    from anchored.train.stage import TrainInputs, train_as_rank

    settings = plan.recipe.train
    with launched(find_device(settings.device).type) as ranks, run.lock() if ranks.first else nullcontext():
        if ranks.once(lambda: _is_due(run, plan, progress)):
            rows = _training_rows(run, plan.recipe, progress)
            inputs = TrainInputs(model_of(plan.recipe), rows.training, rows.held_out)
            train_as_rank(run, settings, inputs, progress, ranks)
        else:
            progress.note("train: complete")


def _is_due(run: Run, plan: Plan, progress: Progress) -> bool:
    """Ready the run folder; returns whether there is still something to train."""
    if tuple(plan.stages) != ("train",):
        raise RecipeError(
            f"several processes share the train stage alone, not {', '.join(plan.stages)}; use `anchored train` with "
            "torchrun, and this command without"
        )
    _begin(run, plan, progress)
    _check(run, plan, progress)
    return run.summary("train") is None


def _begin(run: Run, plan: Plan, progress: Progress) -> None:
    if not run.has_work():  # a first try that ended at a misspelt setting binds nobody
        recipes.write(run, plan.recipe)
        return
    recipe = take_limit(run, plan.recipe, plan.stages, plan.redo, progress.note)
    if plan.redo is None:
        recipes.begin(run, recipe)
        widen_evaluation(run, plan.recipe, plan.stages, progress.note)
        return
    changed = recipes.changes(run, recipe)
    first = recipes.first_stage(changed) if changed else plan.redo
    if STAGES.index(first) < STAGES.index(plan.redo):
        before = STAGES[: STAGES.index(plan.redo)]
        keys = ", ".join(change.key for change in changed if recipes.first_stage([change]) in before)
        raise RecipeError(f"--redo {plan.redo}: {keys} changed, which touches {first}; use --redo {first}")
    run.redo(plan.redo)
    recipes.write(run, recipe)


def _check(run: Run, plan: Plan, progress: Progress) -> None:
    """What would fail late fails now: hours of sampling should not end at a misspelt benchmark."""
    recipe, due = plan.recipe, {stage for stage in plan.stages if run.summary(stage) is None} - {"report"}
    if due - {"create"} or ("create" in due and _answers_here(recipe)):
        check_template(recipe)
    if "create" in due:
        check_creation(recipe)
        if folder := _copy_to(recipe):
            check_copy(run, folder)
    if "evaluate" in due:
        if named := [name for name in recipe.evaluate.benchmarks if _is_lm_evals(name)]:
            progress.note(f"lm-eval looks up {', '.join(named)}")  # and loads their data: a minute, for some
        check_evaluation(recipe)


def check_creation(recipe: Recipe) -> None:
    """Raise for settings of `create` that it cannot go by, and servers that cannot be started here."""
    if recipe.train.data is None:
        check_settings(recipe.create)
        asked = recipe.create.endpoints().values()
        _check_servers(recipe.create.sample.serve, *(endpoint.serve for endpoint in asked))
        if recipe.create.copy_to:
            check_folder(place_of(recipe.create.copy_to))


async def check_endpoints(recipe: Recipe, benchmarks: Sequence[Benchmark]) -> list[tuple[str, EndpointSettings, str]]:
    """Who is asked over all stages, by setting, with what is wrong with it; "" where it answers and takes the key."""
    creating = recipe.create.endpoints() if recipe.train.data is None else {}
    used = [*(one.judge for one in benchmarks), recipe.evaluate.stronger]
    evaluating = {name: one for name, one in recipe.evaluate.endpoints().items() if one in used}
    named = {f"create: {name}": one for name, one in creating.items()}
    named |= {f"evaluate: {name}": one for name, one in evaluating.items()}
    problems = await asyncio.gather(*(_problem(one) for one in named.values()))
    return [(role, one, problem) for (role, one), problem in zip(named.items(), problems, strict=True)]


async def _problem(endpoint: EndpointSettings) -> str:
    if endpoint.serve is not None:
        return ""
    try:
        # once: whoever waits for a plan would rather hear of it
        chat = open_endpoints(endpoint.model_copy(update={"retries": 0}))
        try:
            await chat.check()
        finally:
            await chat.close()
    except AnchoredError as error:
        return str(error)
    return ""


def check_evaluation(recipe: Recipe) -> list[Benchmark]:
    """Raise for benchmarks that are unknown or whose data is not there, and for models that cannot answer them."""
    benchmarks, stronger = _benchmarks(recipe), recipe.evaluate.stronger
    check_benchmarks(benchmarks, recipe.evaluate)
    asked = [*(one.judge for one in benchmarks if one.judge), *filter(None, [stronger])]
    _check_servers(recipe.evaluate.sample.serve, *(endpoint.serve for endpoint in asked))
    needing = [one.name for one in benchmarks if isinstance(one, Examining) and one.needs_weights]
    if needing and stronger is not None:
        raise EvaluationError(
            f"evaluate.stronger: {stronger.model} answers at an endpoint, and {', '.join(needing)} needs likelihoods, "
            "which only a model's own weights tell; leave one of both out"
        )
    lora, engine = recipe.train.lora, recipe.evaluate.sample.serve
    if engine is not None and lora is not None and not lora.merge:
        raise EvaluationError(
            f"evaluate.sample.serve: {engine} takes no adapters; set train.lora.merge to true, or leave serve out: "
            "they answer in this process then"
        )
    return benchmarks


def _copy_to(recipe: Recipe) -> str | None:
    """Where the pairs that are made are copied to."""
    return recipe.create.copy_to if recipe.train.data is None else None


def _answers_here(recipe: Recipe) -> bool:
    """Whether making pairs takes the policy's own weights; else they may be made where nobody has them."""
    settings = recipe.create
    return recipe.train.data is None and settings.asks_policy and settings.sample.elsewhere() is None


def _changed_since(run: Run, recipe: Recipe) -> str:
    """What to say of decisions about the pairs, and of prompt files that are no longer those they were made with."""
    return (_DECIDED if run.has_new_decisions() else "") + _changed_prompts(run, recipe)


def _changed_prompts(run: Run, recipe: Recipe) -> str:
    before = (run.summary("create") or {}).get("prompt_files", {})
    try:
        now = templates(recipe.create)
    except RecipeError:  # a file that is gone: the pairs are there
        return ""
    changed = {one.name for role, one in now.items() if role in before and before[role]["sha256"] != one.sha256}
    return f"; {', '.join(sorted(changed))} changed since, --redo create makes the pairs anew" if changed else ""


def _check_servers(*names: str | None) -> None:
    """Raise for a server software that is not installed."""
    for name in names:
        if name is not None and name not in SERVERS:
            find_program(name)


def _create(run: Run, plan: Plan, progress: Progress) -> None:
    recipe = plan.recipe
    if recipe.train.data is not None:
        progress.note(f"create: not needed, train.data is {recipe.train.data}")
    else:
        asyncio.run(_create_pairs(run, recipe, plan.batching, progress))
        BatchFolder(run.batches).note_used()


async def _create_pairs(run: Run, recipe: Recipe, batching: Batching, progress: Progress) -> None:
    settings = recipe.create
    prompts = _limited_prompts(_prompts(settings), recipe.limit)
    if recipe.limit is not None:  # fewer prompts than `take` are no surprise then
        settings = settings.model_copy(update={"prompts": settings.prompts.model_copy(update={"take": None})})
    with ReplyStore(run.replies) as store:
        if settings.engine == "ray":
            await _create_on_ray(run, recipe, settings, prompts, batching, progress)
            return
        purse = Purse(settings.budget_usd, store.spent()) if settings.prices() else None
        async with _opened(run, recipe, batching, Books(store, purse), progress) as them:
            by_batch = None
            if them.batches:
                rows = max(1, min(settings.batch.under_way, len(prompts.prompts) + len(prompts.held_out)))
                by_batch = ByBatch(rows, them.halt)
            await asyncio.gather(*(chat.begin() for chat in them.batches))
            await create(run, settings, prompts, them.chats, progress, by_batch)
            for chat in them.batches:
                await chat.complete()


async def _create_on_ray(
    run: Run,
    recipe: Recipe,
    settings: CreateSettings,
    prompts: datasets_io.PromptRows,
    batching: Batching,
    progress: Progress,
) -> None:
    if _by_batch(run, settings, batching):
        raise RecipeError(
            "create.engine: ray asks request by request; set create.engine=local to go on with batches, or "
            f"{BatchFolder(run.batches).ending} to end those that are under way"
        )
    open_chats = partial(_opened_for_worker, run, recipe)
    order = Order(settings, open_chats, bool(settings.prices()), run=str(run.folder.resolve()))
    async with cluster(order, run.replies, progress) as engine:
        await create(run, settings, prompts, engine.chats, progress, engine=engine)


@asynccontextmanager
async def _opened_for_worker(
    run: Run, recipe: Recipe, books: Books, progress: Progress
) -> AsyncIterator[dict[str, Remembered]]:
    async with _opened(run, recipe, Batching(), books, progress) as them:
        yield them.chats


@asynccontextmanager
async def _opened(
    run: Run, recipe: Recipe, batching: Batching, books: Books, progress: Progress
) -> AsyncIterator[_Opened]:
    """Who answers, until the block ends."""
    with ExitStack() as servers:
        them = _Opened(run, recipe, batching, books, servers, progress)
        try:
            yield them
        finally:
            for chat in them.chats.values():  # the policy first: its check of the others may still be under way
                await chat.close()


class _Opened:
    """Who answers, by role. Roles at one endpoint share its chat, and so its limits; all share the run's money."""

    def __init__(
        self,
        run: Run,
        recipe: Recipe,
        batching: Batching,
        books: Books,
        servers: ExitStack,
        progress: Progress,
    ) -> None:
        self.chats: dict[str, Remembered] = {}
        self.batches: list[BatchChat] = []
        """Those of the endpoints that are asked by batches."""
        self._live: list[Remembered] = []
        """The other chats: while one has something to answer, more may be asked of the batches."""
        self._settings, self._batching, self._books = recipe.create, batching, books
        self._progress = progress
        self._folder = BatchFolder(run.batches)
        asked = recipe.create.endpoints()
        by_batch = _by_batch(run, recipe.create, batching)
        self._note_whose_model_is_gone(by_batch)
        opened: dict[str, OpenAIChat | Endpoints | ServedChat | BatchChat] = {}
        for role, endpoint in asked.items():
            if _address(endpoint) not in opened:
                if role in by_batch:
                    opened[_address(endpoint)] = self._batch_chat(endpoint)
                else:
                    live = servers.enter_context(_teacher(role, endpoint, books, run, progress))
                    opened[_address(endpoint)] = live
        if recipe.create.asks_policy:
            policy = _CheckedFirst(_policy(recipe, books, run, progress), [one.check for one in opened.values()])
            self.chats[POLICY] = books.remember(policy, paid=recipe.create.sample.price is not None)
        # several revisions of one answer are paid for to have different ones
        several = recipe.create.best_of is not None
        chats = {at: WatchedChat(chat, progress.note) if several else chat for at, chat in opened.items()}
        for role, endpoint in asked.items():
            self.chats[role] = books.remember(chats[_address(endpoint)], paid=endpoint.price is not None)
        self._live = [chat for role, chat in self.chats.items() if role not in by_batch]

    def halt(self) -> None:
        """The stage has failed: no batch goes out any more."""
        for chat in self.batches:
            chat.halt()

    def _note_whose_model_is_gone(self, by_batch: Mapping[str, EndpointSettings]) -> None:
        purse = self._books.purse
        asked = {fingerprint(endpoint) for endpoint in by_batch.values()}
        for batch in self._folder.batches():
            if batch.state.fingerprint in asked:
                continue
            # spent, or about to be, and not counted yet
            if isinstance(purse, Purse) and batch.state.file_id and not batch.state.kept:
                purse.set_apart(batch.state.usd)
            if batch.state.is_out:
                self._progress.note(
                    f"{batch.name}: it is under way at {batch.state.base_url} and the recipe asks no "
                    f"{batch.state.fingerprint} now; with its endpoint in the recipe, {self._folder.ending} ends it"
                )

    def _batch_chat(self, endpoint: EndpointSettings) -> BatchChat:
        store, purse = self._books.replies, self._books.purse if endpoint.price else None
        assert isinstance(store, ReplyStore), "batches are followed by one process, which has the store"
        assert purse is None or isinstance(purse, Purse)
        means = Means(
            folder=self._folder,
            store=store,
            api=lambda: BatchApi(Connection(endpoint)),
            live=lambda: open_endpoints(endpoint, purse=purse),
            progress=self._progress,
            busy=lambda: any(chat.busy for chat in self._live),
            purse=purse,
            imports=self._batching.imports,
            together=self.batches,
        )
        chat = BatchChat(endpoint, self._settings.batch, self._batching.way, means)
        self.batches.append(chat)
        return chat


def _by_batch(run: Run, settings: CreateSettings, batching: Batching) -> dict[str, EndpointSettings]:
    """The endpoints whose replies come by batches, or may be under way in one, by their role."""
    under_way = {batch.state.fingerprint for batch in BatchFolder(run.batches).batches() if not batch.state.kept}
    if batching == Batching() and not under_way:
        return {}
    found = _batchable(settings)
    if batching != Batching() and not found:
        served = ", ".join(f"{role} (serve: {one.serve})" for role, one in settings.endpoints().items())
        why = f"{served} answers from this machine" if served else f"{settings.method} asks no endpoint here"
        raise RecipeError(f"--batch: {why}; leave --batch, --batch-export and --batch-import out")
    addresses: dict[str, tuple[str, str]] = {}
    for role, one in found.items():
        model = fingerprint(one)
        other, address = addresses.setdefault(model, (role, _address(one)))
        # a batch is followed by one chat alone
        if address != _address(one) and (batching.way == "submit" or model in under_way):
            raise RecipeError(
                f"create: by batch, {other} and {role} ask the same model {one.model} in two ways; give both the same "
                "base_url, key_env, price and limits"
            )
    return found


def _batchable(settings: CreateSettings) -> dict[str, EndpointSettings]:
    """The endpoints that are somebody else's, by their role; what is served here is asked live."""
    return {role: one for role, one in settings.endpoints().items() if one.serve is None}


def _address(endpoint: EndpointSettings) -> str:
    """What makes two endpoints one: all but how an answer is drawn and what a role adds."""
    return endpoint.model_dump_json(include=set(EndpointSettings.model_fields) - set(Sampling.model_fields))


def _train(run: Run, plan: Plan, progress: Progress) -> None:
    from anchored.train.stage import TrainInputs, train

    recipe = plan.recipe
    rows = _training_rows(run, recipe, progress)
    train(run, recipe.train, TrainInputs(model_of(recipe), rows.training, rows.held_out), progress)


def _evaluate(run: Run, plan: Plan, progress: Progress) -> None:
    recipe, settings = plan.recipe, plan.recipe.evaluate
    if not settings.benchmarks:
        progress.note("evaluate: nothing to do, evaluate.benchmarks is empty")
        return
    if run.summary("train") is None:
        raise EvaluationError(f"{run.folder}: training is not complete; run `anchored train` or `anchored run` first")
    asyncio.run(_evaluate_checkpoints(run, recipe, progress))


async def _evaluate_checkpoints(run: Run, recipe: Recipe, progress: Progress) -> None:
    settings, benchmarks = recipe.evaluate, _benchmarks(recipe)
    checkpoints = _checkpoints(run, recipe)
    priced = any(endpoint.price for endpoint in settings.endpoints().values())
    with ReplyStore(run.replies) as store, ExitStack() as servers:
        purse = Purse(settings.budget_usd, store.spent(), "evaluate") if priced else None
        books = Books(store, purse)
        judges: dict[str, Chat] = {}
        checks: list[Callable[[], Awaitable[None]]] = []
        for name, grader in {_address(one.judge): one.judge for one in benchmarks if one.judge}.items():
            asked = servers.enter_context(_teacher("judge", grader, books, run, progress))
            judges[name] = books.remember(asked, paid=grader.price is not None)
            checks.append(asked.check)

        def open_chat(checkpoint: Checkpoint) -> Chat:
            if checkpoint.name == STRONGER and settings.stronger:
                asked = servers.enter_context(_teacher(STRONGER, settings.stronger, books, run, progress))
                return books.remember(_CheckedFirst(asked, checks), paid=settings.stronger.price is not None)
            log = run.server_log(checkpoint.name)
            chat = _chat_of(checkpoint.folder, checkpoint.name, settings.sample, log, progress)
            return books.remember(_CheckedFirst(chat, checks), paid=False)

        def open_likelihoods(checkpoint: Checkpoint) -> Chat:
            from anchored.evaluate.likelihoods import Likelihoods

            size = settings.sample.batch_size
            return books.remember(Likelihoods(checkpoint.folder, batch_size=size, name=checkpoint.name), paid=False)

        by_name = {one.name: judges[_address(one.judge)] for one in benchmarks if one.judge}
        try:
            await evaluate(
                run,
                settings,
                benchmarks,
                checkpoints,
                open_chat,
                progress,
                by_name,
                purse,
                open_likelihoods,
                recipe.limit,
            )
        finally:
            for judge in judges.values():
                await judge.close()


def _report(run: Run, plan: Plan, progress: Progress) -> None:
    from anchored.report.stage import report

    if not run.has_work():
        raise RecipeError(f"{run.folder}: nothing to report yet; correct --out, or run `anchored run` first")
    report(run)


_STAGES: Mapping[str, Callable[[Run, Plan, Progress], None]] = {
    "create": _create,
    "train": _train,
    "evaluate": _evaluate,
    "report": _report,
}


def check_template(recipe: Recipe) -> None:
    """Raise for a template that takes no finished answers: it cannot be trained with, whatever the pairs."""
    from anchored.batches.render import Conversation, Renderer
    from anchored.llm.model_folder import load_tokenizer

    renderer = Renderer(load_tokenizer(model_of(recipe)))
    try:
        renderer.one(Conversation(*_TRIAL))
    except ModelError as error:
        raise ModelError(f"{recipe.policy.model}: {error}") from error


def given_rows(recipe: Recipe, progress: Progress) -> TrainingData | None:
    """What `train.data` holds, its held-out rows apart; None where `create` makes the pairs."""
    settings = recipe.train
    if settings.data is None:
        return None
    found = datasets_io.read_training(settings.data, split=settings.split)
    if found.refused:
        progress.note(datasets_io.describe_refused(settings.data, found.refused, len(found.rows)))
    rows = found.rows[: recipe.limit]
    held_out = datasets_io.held_out_count(settings.data, settings.held_out, len(_distinct_prompts(rows)))
    return _parted(rows, held_out, settings.seed)


def model_of(recipe: Recipe) -> str | Path:
    """The folder or Hub id of the recipe's policy."""
    named = MODELS.get(recipe.policy.model)
    return named() if named else recipe.policy.model


def _policy(recipe: Recipe, books: Books, run: Run, progress: Progress) -> Chat:
    """The policy, wherever it answers."""
    sample = recipe.create.sample
    if elsewhere := sample.elsewhere():
        purse = books.purse if elsewhere.price else None
        return WatchedChat(OpenAIChat(elsewhere, purse=purse, limits=books.limits(elsewhere)), progress.note)
    return _chat_of(model_of(recipe), recipe.policy.model, sample, _log_of("policy", books, run), progress)


def _chat_of(folder: str | Path, name: str, sample: LocalSampling, log: Path, progress: Progress) -> Chat:
    """A model's own weights, in this process or behind a server of their own."""
    if sample.serve is not None:
        served = _served(folder, name, sample.serve, sample, log)
        return WatchedChat(ServedChat(served, sample.endpoint(name), progress.note), progress.note)
    from anchored.llm.local_chat import LocalChat

    return LocalChat(folder, batch_size=sample.batch_size, name=name)


def _served(folder: str | Path, name: str, engine: Engine, settings: ServedSampling, log: Path) -> Served:
    environment = {variable: str(value) for variable, value in settings.serve_env.items()}
    place = model_folder(folder).resolve()
    return Served(engine, place, name, log, settings.serve_options, environment, settings.serve_seconds)


class _CheckedFirst:
    """A chat that is not asked before checks have passed: no hours of sampling for a teacher whose key is wrong.

    Behind the store, so where every sample is known nothing is checked and the teacher may be out of reach.
    """

    def __init__(self, chat: Chat, checks: Sequence[Callable[[], Awaitable[None]]]) -> None:
        self.name, self.fingerprint = chat.name, chat.fingerprint
        self._chat, self._checks = chat, checks
        self._checked: asyncio.Future[list[None]] | None = None

    async def reply(self, request: Request) -> Reply:
        if self._checked is None:
            self._checked = asyncio.gather(*(check() for check in self._checks))
        await asyncio.shield(self._checked)
        return await self._chat.reply(request)

    async def close(self) -> None:
        if self._checked is not None:
            self._checked.cancel()
            await asyncio.gather(self._checked, return_exceptions=True)
        await self._chat.close()


@contextmanager
def _teacher(
    role: str, settings: EndpointSettings, books: Books, run: Run, progress: Progress
) -> Iterator[OpenAIChat | Endpoints | ServedChat]:
    """The endpoint that the settings name, or the server that they ask to start."""
    purse = books.purse if settings.price else None
    if settings.serve is None:
        yield open_endpoints(settings, purse=purse, limits=books.limits)
    elif settings.serve == "pocket":
        with SERVERS[settings.serve]() as server:
            yield open_endpoints(settings, base_url=server.base_url, purse=purse)
    else:
        served = _served(settings.model, settings.model, settings.serve, settings, _log_of(role, books, run))
        yield ServedChat(served, settings, progress.note)


def _log_of(role: str, books: Books, run: Run) -> Path:
    return run.server_log(f"{role} {books.worker}".strip())


def _prompts(settings: CreateSettings) -> datasets_io.PromptRows:
    source = settings.prompts
    named = PROMPTS.get(source.data)
    if named and settings.decontaminate:
        raise RecipeError(f"create.decontaminate: no benchmark has the prompts of {source.data}; leave it out")
    if named:
        return named(take=source.take, held_out=source.held_out, seed=source.seed)
    return datasets_io.read_prompts(
        source.data,
        take=source.take,
        held_out=source.held_out,
        seed=source.seed,
        split=source.split,
        shared_with_benchmarks=decontaminator(settings.decontaminate).find if settings.decontaminate else None,
    )


def _limited_prompts(rows: datasets_io.PromptRows, limit: int | None) -> datasets_io.PromptRows:
    return replace(rows, prompts=rows.prompts[:limit], held_out=rows.held_out[:limit])


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What is trained on, and what is only measured with."""

    training: Sequence[TrainingRow]
    held_out: Sequence[TrainingRow]


def _training_rows(run: Run, recipe: Recipe, progress: Progress) -> TrainingData:
    if (given := given_rows(recipe, progress)) is not None:
        return given
    if run.summary("create") is None:
        raise RecipeError(f"{run.folder}: no pairs yet; run `anchored create` first, or set train.data to a data set")
    held_out_rows = datasets_io.read_rows(run.held_out) if run.held_out.exists() else []
    return TrainingData(datasets_io.read_rows(run.pairs), held_out_rows)


def _distinct_prompts(rows: Sequence[TrainingRow]) -> list[tuple[Message, ...]]:
    return list(dict.fromkeys(row.prompt.messages for row in rows))


def _parted(rows: Sequence[TrainingRow], held_out: int, seed: int) -> TrainingData:
    """The rows of some prompts apart, drawn by seed: no prompt is both trained on and measured with."""
    apart = set(random.Random(seed).sample(_distinct_prompts(rows), held_out))
    return TrainingData(
        training=[row for row in rows if row.prompt.messages not in apart],
        held_out=[row for row in rows if row.prompt.messages in apart],
    )


def _benchmarks(recipe: Recipe) -> list[Benchmark]:
    """Those that the recipe names, of which `limit` leaves the first items only."""
    return [_benchmark(name, recipe.evaluate, recipe.limit) for name in recipe.evaluate.benchmarks]


def _benchmark(name: str, settings: EvaluateSettings, limit: int | None) -> Benchmark:
    if _is_lm_evals(name):
        return Harness(name, settings, limit, tuple(BENCHMARKS))
    return _Limited(BENCHMARKS[name](settings) if name in BENCHMARKS else Questions(Path(name)), limit)


def _is_lm_evals(name: str) -> bool:
    """Whether a benchmark's name is none of ours, and so to be looked up among lm-eval's tasks."""
    return name not in BENCHMARKS and not name.endswith(".jsonl")


def _checkpoints(run: Run, recipe: Recipe) -> list[Checkpoint]:
    summary: dict[str, Any] = run.summary("train") or {}
    trained = [Checkpoint(name, step, run.checkpoints / name) for name, step in summary["checkpoints"].items()]
    if recipe.evaluate.checkpoints == "last":
        trained = trained[-1:]
    stronger = recipe.evaluate.stronger
    aside = [Checkpoint(STRONGER, 0, stronger.model)] if stronger else []
    # first, so that a wrong key is found before hours of answering
    return [*aside, Checkpoint(START, 0, model_of(recipe)), *trained]


class _Limited:
    """A benchmark of which only the first items are asked (`--limit`)."""

    def __init__(self, benchmark: Benchmark, limit: int | None) -> None:
        self.name, self.version, self.views = benchmark.name, benchmark.version, benchmark.views
        self.judge, self.more_items = benchmark.judge, benchmark.more_items
        self.grade_all, self.judged_by = benchmark.grade_all, benchmark.judged_by
        self.notes, self.export = benchmark.notes, benchmark.export
        self._items = _first(benchmark.items(), limit)

    def items(self) -> Sequence[Item]:
        return self._items


def _first(items: Sequence[Item], limit: int | None) -> Sequence[Item]:
    """The first items, of all strata alike."""
    seen: Counter[str] = Counter()
    rank = {}
    for place, item in enumerate(items):
        rank[place] = (seen[item.stratum], place)
        seen[item.stratum] += 1
    return [items[place] for place in sorted(sorted(rank, key=rank.__getitem__)[:limit])]
