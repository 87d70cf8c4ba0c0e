"""The stage from prompts to files, with scripted chats behind the real store."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pyarrow.parquet
import pytest
from rapidfuzz.distance import Levenshtein
from scripted import REASONED, Heard, Scripted, answer_of, by_prompt, make, prompts, revise, settings, student_of

from anchored.datasets_io import PromptRows, read_pairs, read_prompts, read_rows
from anchored.errors import DataError, ModelError, RecipeError, ReplyError, Stopped
from anchored.llm.chat import Reply, Request
from anchored.records import Message, Outcome, Prompt
from anchored.runs import Run


def test_clair_makes_pairs_of_samples_and_their_revisions(tmp_path: Path) -> None:
    policy, teacher, heard = Scripted("policy", answer_of), Scripted("teacher", revise), Heard()
    summary = make(tmp_path, prompts("a", "b", "c", held_out=["h"]), settings(), policy, teacher, heard)

    pairs = read_pairs(tmp_path / "pairs.parquet").pairs
    assert [pair.prompt.id for pair in pairs] == ["a", "b", "c"], "in the order of the prompts"
    first = pairs[0]
    assert first.rejected.text == "The answer to a is known."
    assert first.chosen.text == "The answer to a is known, because we looked."
    assert (first.rational, first.method) == ("It lacks a reason.", "clair")
    assert (first.chosen.model, first.rejected.model) == ("teacher-1", "policy-1")
    assert [pair.prompt.id for pair in read_rows(tmp_path / "held_out.parquet")] == ["h"]
    assert read_rows(tmp_path / "refused.parquet") == []

    table = pyarrow.parquet.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert table[0]["levenshtein"] == Levenshtein.distance(first.chosen.text, first.rejected.text) == 19
    assert table[0]["length_ratio"] == len(first.chosen.text) / len(first.rejected.text)
    assert table[0]["jaccard"] == pytest.approx(100 * 5 / 10)

    assert (summary.pairs, summary.held_out) == (3, 1)
    assert summary.outcomes == {"ok": 3}
    assert summary.held_out_outcomes == {"ok": 1}
    assert summary.contrast["pairs"] == 3
    assert summary.contrast["tokenizer"] == "whitespace"
    assert summary.replies["teacher"] == {
        "model": "teacher",
        "replies": 4,
        "prompt_tokens": 40,
        "completion_tokens": 20,
        "asked": 4,
        "from_store": 0,
    }
    assert json.loads(json.dumps(Run(tmp_path).summary("create")))["outcomes"] == {"ok": 3}
    assert heard.steps == 4
    assert heard.facts == {"ok": 4}


def test_the_reviser_gets_the_papers_prompt_and_nothing_else(tmp_path: Path) -> None:
    teacher = Scripted("teacher", revise)
    make(
        tmp_path,
        prompts("Why <<answer>>?"),
        settings(filters=[]),
        Scripted("policy", lambda _: "It is known."),
        teacher,
    )
    (request,) = teacher.requests
    shipped = Path(__file__).parents[2] / "anchored/create/prompts/reviser.txt"
    expected = shipped.read_text("utf-8").replace("<<answer>>", "It is known.").replace("<<prompt>>", "Why <<answer>>?")
    assert request.messages == (Message("user", expected),)
    assert expected.endswith("to structure your answer.\n\n")


def test_every_way_a_row_can_end_is_named_and_kept(tmp_path: Path) -> None:
    answers: dict[str, str | Reply] = {
        "p-truncated": Reply("The answer to", "length", "policy-1"),
        "p-empty": Reply(" \n", "stop", "policy-1"),
    }
    replies: dict[str, str | Reply] = {
        "no_header": "It is better now: X.",
        "repeated_header": REASONED + "A\n{corrected_student_solution}: B",
        "empty": REASONED,
        "truncated": Reply(REASONED + "The answer", "length", "teacher-1"),
        "filtered": Reply("", "content_filter", "teacher-1"),
        "refusal": "I'm sorry, but I can't assist with that.",
        "identical": REASONED + "The answer to identical is known.",
        "length_ratio": REASONED + "Known.",
        "leak": REASONED + "In this corrected solution, the answer is known.",
        "ok": REASONED + "The answer to ok is known, as we saw.",
    }

    def policy(request: Request) -> str | Reply:
        return answers.get(request.messages[-1].content, answer_of(request))

    def teacher(request: Request) -> str | Reply:
        name = student_of(request).split()[3]
        if name == "endpoint_error":
            raise ReplyError("teacher at http://there gave no usable reply in 9 attempts")
        return replies[name]

    names = [*answers, *replies, "endpoint_error"]
    heard = Heard()
    summary = make(
        tmp_path, prompts(*names), settings(), Scripted("policy", policy), Scripted("teacher", teacher), heard
    )
    rows = by_prompt(read_rows(tmp_path / "refused.parquet"))
    expected = {name: name for name in replies if name not in ("ok", "filtered")}
    expected |= {
        "p-truncated": "truncated",
        "p-empty": "empty",
        "filtered": "refusal",
        "endpoint_error": "endpoint_error",
    }
    assert {name: str(row.outcome) for name, row in rows.items()} == expected
    assert all(row.detail for row in rows.values())
    assert "policy's answer" in rows["p-truncated"].detail
    assert "In this corrected solution" in rows["leak"].detail
    assert "9 attempts" in rows["endpoint_error"].detail
    assert rows["leak"].chosen.text == "In this corrected solution, the answer is known.", "to be looked at"
    assert rows["no_header"].rejected.text == "The answer to no_header is known."
    assert summary.pairs == 1
    assert summary.outcomes["truncated"] == 2
    assert sum(summary.outcomes.values()) == len(names)
    assert heard.facts == summary.outcomes
    assert [pair.prompt.id for pair in read_pairs(tmp_path / "pairs.parquet").pairs] == ["ok"]


def test_another_filter_asks_nothing_again(tmp_path: Path) -> None:
    def leak(request: Request) -> str:
        return REASONED + "In this corrected solution, the answer is known."

    rows = prompts("a", "b")
    with pytest.raises(DataError, match="2 leak"):
        make(tmp_path, rows, settings(), Scripted("policy", answer_of), Scripted("teacher", leak))
    policy, teacher = Scripted("policy", answer_of), Scripted("teacher", leak)
    summary = make(tmp_path, rows, settings(filters=[]), policy, teacher)
    assert summary.pairs == 2
    assert policy.requests == teacher.requests == []
    assert summary.replies["teacher"]["from_store"] == 2


def test_a_stop_in_the_middle_loses_nothing(tmp_path: Path) -> None:
    down = Scripted("teacher", revise)

    def goes_down(request: Request) -> str:
        if len(down.requests) == 3:
            raise Stopped("teacher at http://there is down")
        return revise(request)

    down._say = goes_down
    names = [f"question {number}" for number in range(8)]
    policy = Scripted("policy", answer_of)
    with pytest.raises(Stopped, match="is down"):
        make(tmp_path, prompts(*names), settings(), policy, down)
    assert Run(tmp_path).summary("create") is None
    assert len(down.requests) == 3

    again, teacher = Scripted("policy", answer_of), Scripted("teacher", revise)
    summary = make(tmp_path, prompts(*names), settings(), again, teacher)
    assert summary.pairs == 8
    assert len(teacher.requests) == 5, "the three replies from before were not asked for again"
    assert len(policy.requests) + len(again.requests) == 8


def test_an_endpoint_that_takes_nothing_ends_the_stage(tmp_path: Path) -> None:
    def refuse(request: Request) -> str:
        raise ModelError("teacher at http://there refused the key (401); put a valid key in KEY")

    with pytest.raises(ModelError, match="put a valid key"):
        make(tmp_path, prompts("a", "b"), settings(), Scripted("policy", answer_of), Scripted("teacher", refuse))


def test_the_teacher_works_while_the_policy_still_samples(tmp_path: Path) -> None:
    revised = asyncio.Event()

    class Slow(Scripted):
        async def reply(self, request: Request) -> Reply:
            if request.messages[-1].content == "last":
                await asyncio.wait_for(revised.wait(), 10)
            return await super().reply(request)

    def tell(request: Request) -> str:
        revised.set()
        return revise(request)

    assert make(
        tmp_path, prompts("first", "last"), settings(), Slow("policy", answer_of), Scripted("teacher", tell)
    ).pairs


def test_no_pair_at_all_is_an_error_that_says_where_the_rows_went(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of 2 prompts became a pair \(2 no_header\)") as raised:
        make(
            tmp_path,
            prompts("a", "b"),
            settings(),
            Scripted("policy", answer_of),
            Scripted("teacher", lambda _: "Good."),
        )
    assert "refused.parquet" in str(raised.value)
    assert "'Good.'" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert {row.outcome for row in read_rows(tmp_path / "refused.parquet")} == {Outcome.NO_HEADER}
    assert Run(tmp_path).summary("create") is None
    assert not (tmp_path / "pairs.parquet").exists()


def test_without_any_reply_the_same_command_asks_again_and_the_reason_is_told_once(tmp_path: Path) -> None:
    def fail(_: Request) -> str:
        raise ReplyError("teacher at http://there refused the request (400: no)")

    heard = Heard()
    with pytest.raises(DataError, match=r"2 endpoint_error.*the same command asks again.*refused the request"):
        make(tmp_path, prompts("a", "b"), settings(), Scripted("policy", answer_of), Scripted("teacher", fail), heard)
    assert heard.notes == []
    again = make(tmp_path, prompts("a", "b"), settings(), Scripted("policy", answer_of), Scripted("teacher", revise))
    assert again.pairs == 2


def sometimes_good(request: Request) -> str:
    """Two of three revisions pass."""
    number = int(student_of(request).split()[4])
    return revise(request) if number % 3 else REASONED + "Known."


def test_a_target_goes_on_until_so_many_pairs_are_accepted(tmp_path: Path) -> None:
    rows = prompts(*(f"question {number}" for number in range(1, 61)), held_out=["question 100"])
    policy, teacher, heard = Scripted("policy", answer_of), Scripted("teacher", sometimes_good), Heard()
    summary = make(tmp_path, rows, settings(target=20), policy, teacher, heard)
    good = [f"question {number}" for number in range(1, 61) if number % 3]
    assert [pair.prompt.id for pair in read_pairs(tmp_path / "pairs.parquet").pairs] == good[:20]
    assert (summary.pairs, summary.held_out) == (20, 1)
    assert 30 <= len(policy.requests) <= 34, "hardly more than are needed, for they are paid for"
    assert heard.steps - 1 - summary.outcomes.get("surplus", 0) == 20, "pairs are counted, and the held-out row"

    more = make(tmp_path, rows, settings(target=24), policy, teacher)
    assert more.pairs == 24
    assert [pair.prompt.id for pair in read_pairs(tmp_path / "pairs.parquet").pairs] == good[:24]
    assert len(teacher.requests) == len({request.messages for request in teacher.requests}), "nothing is asked twice"


def test_pairs_beyond_the_target_are_refused_by_name(tmp_path: Path) -> None:
    def late(request: Request) -> str:
        number = int(student_of(request).split()[4])
        return revise(request) if number > 10 else REASONED + "Known."

    rows = prompts(*(f"question {number}" for number in range(1, 31)))
    summary = make(tmp_path, rows, settings(target=5), Scripted("policy", answer_of), Scripted("teacher", late))
    assert summary.outcomes == {"length_ratio": 10, "ok": 5, "surplus": 5}
    surplus = [row for row in read_rows(tmp_path / "refused.parquet") if row.outcome is Outcome.SURPLUS]
    assert [row.prompt.id for row in surplus] == [f"question {number}" for number in range(16, 21)]
    assert surplus[0].detail == "create.target asks for 5 pairs"


def test_a_target_beyond_the_prompts_ends_with_what_there_is(tmp_path: Path) -> None:
    rows, heard = prompts(*(f"question {number}" for number in range(1, 13))), Heard()
    summary = make(
        tmp_path, rows, settings(target=20), Scripted("policy", answer_of), Scripted("teacher", sometimes_good), heard
    )
    assert summary.pairs == 8
    assert heard.notes == ["create: 8 pairs of all 12 prompts, not 20"]


def test_a_prompt_file_with_a_wrong_slot_is_found_before_anything_is_asked(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("Improve <<answr>> for <<prompt>>")
    policy = Scripted("policy", answer_of)
    with pytest.raises(RecipeError, match=r"mine.txt: the prompt has the slot <<answr>>"):
        make(
            tmp_path,
            prompts("a"),
            settings(reviser={"model": "teacher", "prompt": str(tmp_path / "mine.txt")}),
            policy,
            Scripted("teacher", revise),
        )
    assert policy.requests == []


def test_rows_of_the_data_without_a_prompt_and_missing_prompts_are_told(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "a"}\n{"prompt": null}\n{"prompt": "b"}\n')
    rows = read_prompts(tmp_path / "data.jsonl", take=5)
    heard = Heard()
    chosen = settings(prompts={"data": "data.jsonl", "take": 5})
    summary = make(tmp_path, rows, chosen, Scripted("policy", answer_of), Scripted("teacher", revise), heard)
    assert (summary.pairs, summary.prompts_refused) == (2, 1)
    assert "asks for 5 prompts, there are 2" in heard.notes[0]
    assert "data.jsonl line 2" in heard.notes[1]
    (row,) = read_rows(tmp_path / "refused.parquet")
    assert row.outcome is Outcome.MALFORMED


def test_a_system_turn_and_earlier_turns_reach_policy_and_reviser(tmp_path: Path) -> None:
    turns = (
        Message("system", "Be brief."),
        Message("user", "Hi"),
        Message("assistant", "Hello"),
        Message("user", "Why?"),
    )
    policy, teacher = Scripted("policy", answer_of), Scripted("teacher", revise)
    make(tmp_path, PromptRows([Prompt(turns, "talk")], []), settings(), policy, teacher)
    assert policy.requests[0].messages == turns
    blocks = "{task}: System: Be brief.\n\nUser: Hi\n\nAssistant: Hello\n\nUser: Why?\n\n{student_solution}: The answer"
    assert blocks in teacher.requests[0].messages[0].content


def test_stronger_preferred_takes_the_teachers_own_answer_and_filters_nothing(tmp_path: Path) -> None:
    said = {"a": "No. " * 100, "same": "The answer to same is known.", "no": "I'm sorry, but I can't assist with that."}
    teacher = Scripted("teacher", lambda request: said[request.messages[-1].content])
    chosen = settings(method="stronger-preferred", stronger={"model": "teacher"})
    summary = make(tmp_path, prompts("a", "same", "no"), chosen, Scripted("policy", answer_of), teacher)
    assert summary.outcomes == {"ok": 1, "identical": 1, "refusal": 1}
    (pair,) = read_pairs(tmp_path / "pairs.parquet").pairs
    assert pair.chosen.text == said["a"].strip()
    assert pair.rejected.text == "The answer to a is known."
    assert teacher.requests[0].messages == (Message("user", "a"),), "the prompt itself, without any instruction"


def two_answers(request: Request) -> str:
    return f"{['bad', 'good'][request.index]} answer to {request.messages[-1].content}"


def prefer_good(request: Request) -> str:
    question = request.messages[0].content
    first_is_good = question.index("good answer") < question.index("bad answer")
    return f"Compared with [1] and [2]... the best is [{1 if first_is_good else 2}]"


def test_judge_on_policy_pairs_what_the_judge_picks_whichever_order_it_saw(tmp_path: Path) -> None:
    names = [f"question {number}" for number in range(40)]
    judge = Scripted("teacher", prefer_good)
    policy = Scripted("policy", two_answers)
    chosen = settings(method="judge-on-policy", judge={"model": "teacher"})
    assert make(tmp_path, prompts(*names), chosen, policy, judge).pairs == 40
    pairs = read_pairs(tmp_path / "pairs.parquet").pairs
    assert all(pair.chosen.text.startswith("good") and pair.rejected.text.startswith("bad") for pair in pairs)
    assert pairs[0].chosen.model == pairs[0].rejected.model == "policy-1"
    good_first = sum("[1]" in pair.rational[-5:] for pair in pairs)
    assert 8 <= good_first <= 32, "the order is drawn per prompt"
    assert {request.index for request in policy.requests} == {0, 1}
    assert len(judge.requests) == 40


def test_a_judge_that_always_says_one_picks_by_position_and_both_orders_find_out(tmp_path: Path) -> None:
    names = [f"question {number}" for number in range(40)]
    chosen = settings(method="judge-on-policy", judge={"model": "teacher"})
    make(tmp_path / "one", prompts(*names), chosen, Scripted("policy", two_answers), Scripted("t", lambda _: "[1]"))
    texts = [pair.chosen.text for pair in read_pairs(tmp_path / "one/pairs.parquet").pairs]
    assert 8 <= sum(text.startswith("good") for text in texts) <= 32

    chosen = settings(method="judge-on-policy", judge={"model": "teacher", "orders": "both"})
    with pytest.raises(DataError, match="40 disagreement"):
        make(
            tmp_path / "both", prompts(*names), chosen, Scripted("policy", two_answers), Scripted("t", lambda _: "[1]")
        )
    judge = Scripted("teacher", prefer_good)
    assert make(tmp_path / "fair", prompts(*names), chosen, Scripted("policy", two_answers), judge).pairs == 40
    assert len(judge.requests) == 80


def test_judge_rows_end_by_name(tmp_path: Path) -> None:
    def policy(request: Request) -> str | Reply:
        name = request.messages[-1].content
        if name == "cut" and request.index == 1:
            return Reply("bad", "length", "policy-1")
        return "same" if name == "twins" else two_answers(request)

    def judge(request: Request) -> str | Reply:
        question = request.messages[0].content
        if "answer to unsure" in question:
            return "Both are fine."
        if "answer to silent" in question:
            return "I'm sorry, but I can't assist with that."
        if "answer to long" in question:
            return Reply("The first [1] is", "length", "teacher-1")
        return "[2]"

    names = ["twins", "cut", "unsure", "silent", "long", "fine"]
    chosen = settings(method="judge-on-policy", judge={"model": "teacher"})
    make(tmp_path, prompts(*names), chosen, Scripted("policy", policy), Scripted("teacher", judge))
    rows = by_prompt(read_rows(tmp_path / "refused.parquet"))
    assert {name: str(row.outcome) for name, row in rows.items()} == {
        "twins": "identical_samples",
        "cut": "truncated",
        "unsure": "unparsable",
        "silent": "refusal",
        "long": "truncated",
    }
    assert {rows["unsure"].chosen.text, rows["unsure"].rejected.text} == {
        "bad answer to unsure",
        "good answer to unsure",
    }


def test_the_samples_and_the_teacher_are_asked_as_the_settings_say(tmp_path: Path) -> None:
    policy, teacher = Scripted("policy", answer_of), Scripted("teacher", revise)
    chosen = settings(
        sample={"temperature": 0.3, "max_tokens": 7},
        reviser={"model": "teacher", "temperature": 0.0, "top_p": 0.5, "max_tokens": 99},
        prompts={"data": "x", "seed": 3},
    )
    make(tmp_path, prompts("a"), chosen, policy, teacher)
    (sample,), (revision,) = policy.requests, teacher.requests
    assert (sample.temperature, sample.max_tokens, sample.seed) == (0.3, 7, 3)
    assert (revision.temperature, revision.top_p, revision.max_tokens) == (0.0, 0.5, 99)
