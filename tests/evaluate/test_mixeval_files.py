from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from small_mixeval import CHOICES, FREE, VERSION, free, save

from anchored.errors import EvaluationError
from anchored.evaluate.mixeval_files import COUNTS, SHA256, read_files

COMMIT = "0" * 40


def place(clone: Path) -> Path:
    return clone / "mix_eval" / "data" / f"mixeval-{VERSION}" / "mixeval-hard"


def test_a_clone_its_data_folder_and_the_bare_folder_are_found(tmp_path: Path) -> None:
    clone = save(tmp_path / "clone")
    for folder in (clone, clone / "mix_eval" / "data", place(clone), place(clone).parent):
        files = read_files(str(folder), VERSION, official=False)
        assert [row.id for row in files.rows] == [*map(str, range(len(FREE))), *map(str, range(len(CHOICES)))]
        assert not files.official
    assert files.rows[0].target == ("Paris", "Paris, France")
    assert (files.rows[5].target, files.rows[5].options) == (("B",), ("seven", "blue", "loud"))


def test_compressed_files_are_the_same_files(tmp_path: Path) -> None:
    clone = save(tmp_path / "clone")
    before = read_files(str(clone), VERSION, official=False)
    for file in place(clone).glob("*.json"):
        file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    assert read_files(str(clone), VERSION, official=False) == before


def test_files_that_are_not_the_official_ones_are_refused_with_what_differs(tmp_path: Path) -> None:
    clone = save(tmp_path / "clone")
    with pytest.raises(EvaluationError) as caught:
        read_files(str(clone), VERSION)
    for words in ("free-form.json: has 5 rows, not the 500", "lacks 495 (the first is 5)", "2 of 267 TriviaQA"):
        assert words in str(caught.value)
    assert "official_data to false" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_surplus_rows_are_named_by_id(tmp_path: Path) -> None:
    names = [name for name, count in COUNTS[VERSION]["free-form"].items() for _ in range(count)]
    clone = save(tmp_path / "clone", [free(f"{number}?", "x", benchmark=one) for number, one in enumerate(names)])
    with pytest.raises(EvaluationError, match=r"free-form.json: differs from the official free-form file .* in its"):
        read_files(str(clone), VERSION)
    file = place(clone) / "free-form.json"
    rows = json.loads(file.read_text())
    rows["1000"] = rows.pop("7")
    file.write_text(json.dumps(rows))
    with pytest.raises(EvaluationError, match=r"lacks 1 \(the first is 7\), has 1 too many \(the first is 1000\)"):
        read_files(str(clone), VERSION)


def test_a_row_that_stands_twice_is_named(tmp_path: Path) -> None:
    clone = save(tmp_path / "clone")
    file = place(clone) / "free-form.json"
    file.write_text(file.read_text().replace('"1": {', '"0": {', 1))
    with pytest.raises(EvaluationError, match=r"free-form.json: 1 keys stand twice in it, the first is '0'"):
        read_files(str(clone), VERSION, official=False)


def test_the_other_version_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = save(tmp_path / "clone")
    sha = hashlib.sha256((place(clone) / "free-form.json").read_bytes()).hexdigest()
    known = {**SHA256, "2024-08-11": {**SHA256["2024-08-11"], "free-form": sha}}
    monkeypatch.setattr("anchored.evaluate.mixeval_files.SHA256", known)
    with pytest.raises(
        EvaluationError, match=r"is the free-form file of version 2024-08-11, .*name mixeval-hard/2024-"
    ):
        read_files(str(clone), VERSION, official=False)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no rows"),
        ('{"0": 1}', "row 0: has no `prompt`"),
        ('{"0": {"prompt": "x", "benchmark_name": "y", "target": []}}', "row 0: `target` must be a list"),
        (
            '{"0": {"prompt": "x", "benchmark_name": "y", "target": ["1"], "problem_type": "multiple-choice"}}',
            "row 0: is 'multiple-choice', where free-form is expected",
        ),
    ],
)
def test_a_file_of_another_form_is_named(tmp_path: Path, content: str, says: str) -> None:
    clone = save(tmp_path / "clone")
    (place(clone) / "free-form.json").write_text(content)
    with pytest.raises(EvaluationError) as caught:
        read_files(str(clone), VERSION, official=False)
    assert "free-form.json" in str(caught.value)
    assert says in str(caught.value)


def test_a_target_beyond_the_options_is_named(tmp_path: Path) -> None:
    clone = save(tmp_path / "clone", choices=[{**CHOICES[0], "target": [3]}])
    with pytest.raises(EvaluationError, match=r"multiple-choice.json, row 0: `target` must hold the number of one of"):
        read_files(str(clone), VERSION, official=False)


def test_no_data_or_none_there_says_where_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(EvaluationError, match=r"evaluate.mixeval.data: .*git clone https://github.com/Psycoy/MixEval"):
        read_files(None, VERSION)
    with pytest.raises(EvaluationError, match=r"no folder at .*gone"):
        read_files(str(tmp_path / "gone"), VERSION)
    with pytest.raises(EvaluationError, match=r"holds no mixeval-2024-06-01/mixeval-hard/free-form.json"):
        read_files(str(tmp_path), VERSION)
    (tmp_path / "file").touch()
    with pytest.raises(EvaluationError, match="is a file"):
        read_files(str(tmp_path / "file"), VERSION)


def test_a_hub_id_that_the_hub_does_not_have_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EvaluationError, match=r"no folder some/mixeval here, and the Hub gives no such data set"):
        read_files("some/mixeval", VERSION)


class HubFiles(BaseHTTPRequestHandler):
    """As much of the Hub's API as downloading a data set needs, for the files below a folder."""

    root: Path

    def log_message(self, format: str, *args: object) -> None: ...

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        files = {str(file.relative_to(self.root)): file for file in self.root.rglob("*") if file.is_file()}
        if path.startswith("/api/datasets/some/mixeval/revision"):
            self._send(json.dumps({"id": "some/mixeval", "sha": COMMIT}).encode())
        elif path.startswith("/api/datasets/some/mixeval/tree"):
            tree = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": name} for name, file in files.items()
            ]
            self._send(json.dumps(tree).encode())
        elif name := path.partition(f"/{COMMIT}/")[2]:
            self._send(files[name].read_bytes())
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def _send(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("ETag", hashlib.sha1(content).hexdigest())
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def test_a_repository_of_the_hub_is_downloaded_and_read(tmp_path: Path) -> None:
    data = save(tmp_path / "clone") / "mix_eval" / "data"
    (data / "other").mkdir()
    (data / "other" / "large.bin").touch()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (HubFiles,), {"root": data}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "from anchored.evaluate.mixeval_files import read_files\n"
        f"print(len(read_files('some/mixeval', '{VERSION}', official=False).rows))"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    server.shutdown()
    server.server_close()
    assert done.stdout.strip() == str(len(FREE) + len(CHOICES)), done.stderr
    assert not [*(tmp_path / "hub").rglob("large.bin")]
