"""What users get wrong, what breaks under them: one line names it and the way out, exit code 2, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from commands import ENVIRONMENT, POCKET, STUCK_SECONDS, Finished, anchored, command

from anchored.pocket.world import policy_folder
from anchored.runs import Run

TINY = ("create.prompts.take=6", "create.prompts.held_out=2", "train.epochs=1")


def assert_one_line(done: Finished, *says: str) -> None:
    assert done.code == 2, (done.out, done.err)
    lines = done.err.strip().splitlines()
    assert len(lines) == 1, done.err
    assert lines[0].startswith("error: ")
    for part in says:
        assert part in lines[0]


def test_an_unknown_key(tmp_path: Path) -> None:
    done = anchored("run", POCKET, "train.epoch=3", "--out", tmp_path / "run")
    assert_one_line(done, "train.epoch: unknown key", "did you mean 'epochs'")
    assert not (tmp_path / "run").exists()


def test_a_wrong_objective_name(tmp_path: Path) -> None:
    done = anchored("run", POCKET, "train.objective.name=apo_zero", "--out", tmp_path / "run")
    assert_one_line(done, "'apo_zero'", "did you mean 'apo-zero'")


def test_a_missing_model_folder(tmp_path: Path) -> None:
    done = anchored("run", POCKET, *TINY, f"policy.model={tmp_path}/gone", "--out", tmp_path / "run")
    assert_one_line(done, f"{tmp_path}/gone")


def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(policy_folder(), model)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    config = model / "tokenizer_config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "chat_template"}))
    done = anchored("run", POCKET, *TINY, f"policy.model={model}", "--out", tmp_path / "run")
    assert_one_line(done, "chat template", str(model))


@pytest.mark.parametrize("text", ["", "\n\n", "[]"])
def test_an_empty_data_set(tmp_path: Path, text: str) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text(text)
    assert_one_line(anchored("contrast", data), str(data))
    assert_one_line(anchored("run", POCKET, f"train.data={data}", "--out", tmp_path / "run"), str(data))


def test_pairs_with_equal_answers(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    equal = {"prompt": "Add 1 and 1.", "chosen": "It is 2.", "rejected": "It is 2."}
    data.write_text(json.dumps(equal) + "\n")
    assert_one_line(anchored("run", POCKET, f"train.data={data}", "--out", tmp_path / "run"), str(data), "identical")
    data.write_text(json.dumps(equal) + "\n" + json.dumps({**equal, "rejected": "It is 3."}) + "\n")
    done = anchored(
        "run", POCKET, f"train.data={data}", "train.epochs=1", "--until", "train", "--out", tmp_path / "run2"
    )
    assert done.code == 0, done.err
    assert "1 identical" in done.out


def test_an_endpoint_that_is_down(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: nothing else can take the port
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        settings = (*TINY, "create.reviser.serve=null", f"create.reviser.base_url={url}")
        done = anchored("run", POCKET, *settings, "--out", tmp_path / "run")
    assert_one_line(done, url)


def test_a_missing_key(tmp_path: Path) -> None:
    settings = (*TINY, "create.reviser.serve=null", "create.reviser.key_env=ANCHORED_TEST_KEY_THAT_IS_NOT_SET")
    done = anchored("run", POCKET, *settings, "--out", tmp_path / "run")
    assert_one_line(done, "ANCHORED_TEST_KEY_THAT_IS_NOT_SET")


def test_a_corrupt_store_is_named_and_left_as_it_is(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    run.replies.write_bytes(b"not a database, but a long enough text" * 100)
    before = run.replies.read_bytes()
    done = anchored("run", POCKET, *TINY, "--out", run.folder)
    assert_one_line(done, str(run.replies))
    assert run.replies.read_bytes() == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"needs the right to mount a small file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_loses_nothing(small_disk: Path) -> None:
    run = Run(small_disk / "run")
    filler = small_disk / "filler"
    filler.write_bytes(os.urandom(1_000_000))
    # the pairs fit, the checkpoints do not
    done = anchored("run", POCKET, *TINY, "--limit", "6", "--out", run.folder)
    assert_one_line(done, "space")
    assert run.summary("create") is not None
    filler.unlink()
    again = anchored("run", POCKET, *TINY, "--limit", "6", "--out", run.folder, "--until", "create")
    assert again.code == 0, again.err


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    assert_one_line(anchored("run", tmp_path / "gone.yaml"), "gone.yaml", "no such recipe")


def test_an_unknown_command_and_an_unknown_option() -> None:
    assert_one_line(anchored("trian"), "trian")
    assert_one_line(anchored("run", POCKET, "--untl", "train"), "--untl")


def test_training_before_there_are_pairs(tmp_path: Path) -> None:
    assert_one_line(anchored("train", POCKET, "--out", tmp_path / "run"), "no pairs yet", "anchored create")


def test_a_benchmark_that_is_not_known(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"policy": {"model": "pocket"}, "evaluate": {"benchmarks": ["poket"]}}))
    done = anchored("run", path, "--out", tmp_path / "run")
    assert_one_line(done, "'poket'")


@pytest.mark.parametrize("out", ["file", "file/run"])
def test_a_run_folder_that_cannot_be_one(tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert_one_line(anchored("run", POCKET, *TINY, "--out", tmp_path / out), str(tmp_path / out), "another place")


def test_options_are_named_with_their_values() -> None:
    assert_one_line(anchored("run", POCKET, "--until", "trian"), "--until", "'trian'", "'train'")
    assert_one_line(anchored("run", POCKET, "--limit", "few"), "--limit")


def test_a_section_that_stands_twice(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("policy: {model: pocket}\ntrain: {epochs: 2}\ntrain: {seed: 1}\n")
    assert_one_line(anchored("run", path, "--out", tmp_path / "run"), "'train' stands twice")


def test_a_place_that_a_template_has_yet_to_fill(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("policy: {model: {{MODEL}}}\n")
    assert_one_line(anchored("run", path, "--out", tmp_path / "run"), str(path), "need quotes", "line 1")


def test_a_key_in_the_place_of_its_name_is_not_shown(tmp_path: Path) -> None:
    for setting in ("key_env=sk-my-secret", "base_url=https://me:sk-my-secret@host/v1"):
        done = anchored("run", POCKET, *TINY, f"create.reviser.{setting}", "--out", tmp_path / "run")
        assert_one_line(done, setting.split("=")[0])
        assert "sk-my-secret" not in done.err + done.out
    assert not (tmp_path / "run").exists()


def test_a_corrected_setting_is_no_change_where_nothing_was_made(tmp_path: Path) -> None:
    arguments = ("create", POCKET, *TINY, "--out", tmp_path / "run")
    assert_one_line(anchored(*arguments, f"create.prompts.data={tmp_path}/gone.jsonl"), "gone.jsonl")
    done = anchored(*arguments)
    assert done.code == 0, done.err


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_says_that_it_goes_on(tmp_path: Path, sent: int) -> None:
    run = Run(tmp_path / "run")
    arguments = command(["create", POCKET, "--out", run.folder])
    with subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not run.replies.exists():
            time.sleep(0.01)
        process.send_signal(sent)
        error = process.communicate(timeout=STUCK_SECONDS)[1].decode()
    assert process.returncode == 3, error
    assert error == "error: interrupted; the same command goes on from here\n"


class Mute(BaseHTTPRequestHandler):
    """Takes questions and never answers."""

    asked = threading.Event()
    over = threading.Event()

    def do_POST(self) -> None:
        self.asked.set()
        self.over.wait()

    def do_GET(self) -> None:
        self.send_response(404)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def test_a_run_in_the_background_of_a_script_is_ended_by_sigterm_alone_and_counts_what_was_in_flight(
    tmp_path: Path,
) -> None:
    prompts, answers, run = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl", Run(tmp_path / "run")
    prompts.write_text('{"id": "1", "prompt": "Why?"}\n{"id": "2", "prompt": "How?"}\n')
    answers.write_text('{"id": "1", "completion": "Because."}\n{"id": "2", "completion": "So."}\n')
    with ThreadingHTTPServer(("127.0.0.1", 0), Mute) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        arguments = command(
            [
                *("create", POCKET, "--out", run.folder, f"create.answers.policy={answers}"),
                f"create.prompts={{data: {prompts}, held_out: 0}}",
                f"create.reviser={{model: m, base_url: 'http://127.0.0.1:{server.server_port}/v1', "
                "price: {input: 1, output: 1}}",
            ]
        )
        # as a shell without job control does it for `anchored create ... &`
        behind = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *arguments]
        with subprocess.Popen(behind, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            assert Mute.asked.wait(STUCK_SECONDS)
            process.send_signal(signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)
            process.send_signal(signal.SIGTERM)
            error = process.communicate(timeout=STUCK_SECONDS)[1].decode()
        Mute.over.set()
        server.shutdown()
    assert process.returncode == 3, error
    assert error == "error: interrupted; the same command goes on from here\n"
    with closing(sqlite3.connect(run.replies)) as store:
        assert store.execute("select basis from spending group by 1").fetchall() == [("unsure",)]


def test_a_report_on_a_folder_without_a_run(tmp_path: Path) -> None:
    assert_one_line(anchored("report", POCKET, "--out", tmp_path / "typo"), "typo", "nothing to report")


def test_a_template_that_takes_no_finished_answers_ends_before_anything_is_sampled(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(policy_folder(), model)
    # as models do that always think: the generation prompt opens a thought that a finished answer lacks
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
    )
    done = anchored("run", POCKET, *TINY, f"policy.model={model}", "--out", tmp_path / "run")
    assert_one_line(done, f"{model}: ", "chat template")
    assert not Run(tmp_path / "run").replies.exists()


def test_two_benchmarks_of_one_name(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "q.jsonl").write_text(json.dumps({"prompt": "1 + 1?", "answer": "2"}))
    files = f"[{tmp_path}/a/q.jsonl, {tmp_path}/b/q.jsonl]"
    done = anchored("run", POCKET, *TINY, f"evaluate.benchmarks={files}", "--out", tmp_path / "run")
    assert_one_line(done, "two are named 'q'")
