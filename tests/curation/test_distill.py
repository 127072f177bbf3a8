"""distill over real HTTP against a server with every fault: each question ends exactly once, and nothing is lost."""

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1jax.curation.distill import distill
from s1jax.curation.endpoint import EndpointError
from s1jax.curation.sections import DistillSection
from s1jax.jsonl import InputError
from s1jax.paths import WriteError
from tests.curation.conftest import KEY, endpoint, rows, write_questions
from tests.curation.conftest import settings as section_words
from tests.curation.server import FATAL, FINAL, RUBBISH, TRANSIENT, Server, serving
from tests.decoding.conftest import ROOT
from tests.processes import wait_until
from tests.small_disk import small_disk

MAX_RETRIES, MAX_RUBBISH = 3, 1
NAMES = [f"question {i}" for i in range(8)]
FAULTS = st.sampled_from([*TRANSIENT, *RUBBISH, *FINAL])


def expected(faults: list[str]) -> tuple[str, int]:
    """How a question with these faults must end, and after how many requests."""
    transient = rubbish = 0
    for number, fault in enumerate(faults, start=1):
        transient += fault in TRANSIENT
        rubbish += fault in RUBBISH
        if fault in FINAL or transient > MAX_RETRIES or rubbish > MAX_RUBBISH:
            return "failed", number
    return "done", len(faults) + 1


def teacher(server: Server, **changes: Any) -> DistillSection:
    words = {"max_retries": MAX_RETRIES, "max_rubbish_retries": MAX_RUBBISH, "concurrency": 4, **changes}
    return DistillSection(endpoint=endpoint(server, **words), instruction="\nin a box")


def run_distill(
    directory: Path, server: Server, stderr: int = subprocess.PIPE, **changes: Any
) -> "subprocess.Popen[str]":
    words = {"max_retries": MAX_RETRIES, "max_rubbish_retries": MAX_RUBBISH, "concurrency": 4, **changes}
    section = json.dumps({"endpoint": section_words(server, **words), "instruction": "\nin a box"})
    command = [sys.executable, "-m", "tests.curation.run_distill", str(directory), section]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True)


def check_ended(directory: Path, faults: dict[str, list[str]], names: list[str]) -> None:
    """Every question has one line: done with its own trace and answer, or failed with a reason."""
    traces = rows(directory / "traces.jsonl")
    assert sorted(row["id"] for row in traces) == sorted(names)
    for row in traces:
        name = row["id"]
        assert row["status"] == expected(faults.get(name, []))[0], row
        if row["status"] == "done":
            assert (row["trace"], row["answer"]) == (f"Thinking of {name}\nin a box", f"The answer to {name}\nin a box")
            assert (row["reason"], row["prompt_tokens"], row["completion_tokens"]) == (None, 10, 20)
        else:
            assert row["reason"]
            assert (row["trace"], row["answer"]) == (None, None)


@settings(max_examples=20)
@given(faults=st.dictionaries(st.sampled_from(NAMES), st.lists(FAULTS, max_size=5)))
def test_every_question_ends_exactly_once(faults: dict[str, list[str]]) -> None:
    with tempfile.TemporaryDirectory() as directory, serving(faults) as server:
        output = write_questions(Path(directory), NAMES)
        # Long enough for a busy machine, unless a timeout is to be waited for.
        timeout = 1.5 if any("timeout" in of_question for of_question in faults.values()) else 20.0
        counts = distill(teacher(server, timeout=timeout), output)
        check_ended(output, faults, NAMES)
        assert server.asked == {name: expected(faults.get(name, []))[1] for name in NAMES}
        endings = [expected(faults.get(name, []))[0] for name in NAMES]
        assert counts == {"done": endings.count("done"), "failed": endings.count("failed"), "unasked": 0}
        assert server.most_under_way <= 4 + any("timeout" in of_question for of_question in faults.values()) * 8
        # Again: nothing is left to ask, and nothing changes.
        before = (output / "traces.jsonl").read_bytes()
        assert distill(teacher(server), output) == counts
        assert sum(server.asked.values()) == sum(expected(faults.get(name, []))[1] for name in NAMES)
        assert (output / "traces.jsonl").read_bytes() == before


@settings(max_examples=2)
@given(
    faults=st.dictionaries(
        st.sampled_from([f"question {i}" for i in range(60)]),
        st.lists(st.sampled_from(["429", "500", "drop", "half JSON", "HTML", "schema", "400"]), max_size=3),
        min_size=30,
    ),
    kills=st.lists(st.integers(1, 50), min_size=2, max_size=2).map(sorted),
)
def test_killed_in_the_middle_nothing_is_asked_twice_and_nothing_is_lost(
    faults: dict[str, list[str]], kills: list[int]
) -> None:
    names = [f"question {i}" for i in range(60)]
    with tempfile.TemporaryDirectory() as directory, serving(faults) as server:
        server.delay = 0.02
        output = write_questions(Path(directory), names)
        journal = output / "responses.jsonl"
        for kill in kills:
            process = run_distill(output, server)
            wait_until(lambda kill=kill: journal.exists() and journal.read_bytes().count(b"\n") >= kill, [process])
            process.send_signal(signal.SIGKILL)
            process.communicate()
            wait_until(lambda: server.under_way == 0, [])
            whole = journal.read_bytes().rpartition(b"\n")[0].splitlines()
            ended = {row["id"] for row in map(json.loads, whole) if row["status"] != "retried"}
            asked = {name: server.asked[name] for name in ended}
        assert 0 < len(ended) < len(names)
        process = run_distill(output, server)
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert {name: server.asked[name] for name in ended} == asked
        traces = rows(output / "traces.jsonl")
        assert sorted(row["id"] for row in traces) == sorted(names)
        for row in traces:
            # A kill may forget how often a question was tried before, so one with few faults is done for certain.
            assert row["status"] in ("done", expected(faults.get(row["id"], []))[0])
        assert json.loads(out)["done"] == sum(row["status"] == "done" for row in traces)


@settings(max_examples=15)
@given(share=st.floats(0, 1))
def test_a_journal_that_ends_anywhere_is_gone_on_with(share: float) -> None:
    faults = {NAMES[1]: ["HTML"], NAMES[2]: ["400"], NAMES[3]: ["schema", "schema"]}
    with tempfile.TemporaryDirectory() as directory, serving(faults) as server:
        output = write_questions(Path(directory), NAMES)
        distill(teacher(server), output)
        journal, whole = output / "responses.jsonl", (output / "responses.jsonl").read_bytes()
        journal.write_bytes(whole[: int(share * len(whole))])
        kept = {
            row["id"] for row in map(json.loads, journal.read_bytes().split(b"\n")[:-1]) if row["status"] != "retried"
        }
        asked = server.asked.copy()
        distill(teacher(server), output)
        assert server.asked - asked == dict.fromkeys(set(NAMES) - kept, 1)
        assert sorted(row["id"] for row in rows(output / "traces.jsonl")) == NAMES


def test_a_journal_of_something_else_is_refused(tmp_path: Path) -> None:
    with serving() as server:
        output = write_questions(tmp_path, NAMES)
        distill(teacher(server), output)
        with pytest.raises(InputError, match="written with other values of model"):
            distill(teacher(server, model="another"), output)
        journal = output / "responses.jsonl"
        journal.write_bytes(b"not JSON\n" + journal.read_bytes())
        with pytest.raises(
            InputError, match=r"responses.jsonl: line 1: it is no object in JSON: it was not written by this command"
        ):
            distill(teacher(server), output)


def test_two_runs_at_once_do_not_ask_twice(tmp_path: Path) -> None:
    with serving() as server:
        server.delay = 0.5
        output = write_questions(tmp_path, NAMES)
        endpoint = [f"distill.endpoint.{key}={value}" for key, value in section_words(server, concurrency=1).items()]
        command = [sys.executable, "-m", "s1jax.curate", "distill", f"output_dir={output}", "sources.s.path=none"]
        first = subprocess.Popen([*command, *endpoint], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: bool(server.asked), [first])
        second = subprocess.run([*command, *endpoint], cwd=ROOT, capture_output=True, text=True, check=False)
        assert second.returncode == 1
        assert second.stderr.startswith(f"error: {output}: another run is writing here")
        assert first.wait(timeout=60) == 0
        assert server.asked == dict.fromkeys(NAMES, 1)


@pytest.mark.parametrize("fault", ["429", "429 date"])
def test_retry_after_is_honoured(fault: str, tmp_path: Path) -> None:
    with serving({NAMES[0]: [fault]}) as server:
        server.retry_after = "2"
        distill(teacher(server), write_questions(tmp_path, NAMES[:2]))
        first, second = server.times[NAMES[0]]
        # A date has whole seconds.
        assert second - first >= (2.0 if fault == "429" else 1.0)
        assert server.asked[NAMES[1]] == 1


def test_a_wait_too_long_stops_the_run(tmp_path: Path) -> None:
    with serving({NAMES[0]: ["429"]}) as server:
        server.retry_after = "86400"
        output = write_questions(tmp_path, NAMES[:1])
        with pytest.raises(EndpointError, match=r"asks to wait 86400 s .*1 unasked"):
            distill(teacher(server), output)
        assert distill(teacher(server), output) == {"done": 1, "failed": 0, "unasked": 0}


@pytest.mark.parametrize("fault", FATAL)
def test_an_error_that_nothing_gets_past_stops_the_run(fault: str, tmp_path: Path) -> None:
    with serving({name: [fault] for name in NAMES[4:]}) as server:
        output = write_questions(tmp_path, NAMES)
        with pytest.raises(EndpointError) as error:
            distill(teacher(server, concurrency=2), output)
        assert "\n" not in str(error.value)
        assert server.url in str(error.value)
        done = [row["id"] for row in rows(output / "traces.jsonl")]
        assert set(NAMES[:4]) <= set(done)
        assert f"{len(done)} done, 0 failed, {len(NAMES) - len(done)} unasked" in str(error.value)
        assert sum(server.asked.values()) <= 4 + 2
        server.faults = {}
        assert distill(teacher(server), output) == {"done": 8, "failed": 0, "unasked": 0}
        assert all(server.answered[name] == 1 for name in NAMES)


@pytest.mark.parametrize("status", ["301", "302", "303", "307", "308"])
def test_a_redirect_is_not_followed(status: str, tmp_path: Path) -> None:
    write_questions(tmp_path, NAMES)
    with serving() as other, serving({name: [status] for name in NAMES}) as server:
        server.location = f"{other.url}/chat/completions"
        with pytest.raises(EndpointError, match=f"it redirects to {other.url}/chat/completions: is base_url wrong"):
            distill(teacher(server), tmp_path)
        assert not other.bodies
    assert not rows(tmp_path / "traces.jsonl")


def test_an_expired_key_is_told_in_one_line_and_a_new_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as server:
        server.key = "sk-the-new-one"
        output = write_questions(tmp_path, NAMES)
        process = run_distill(output, server)
        _, err = process.communicate()
        assert process.returncode == 1
        assert err.count("\n") == 1
        assert "the key is wrong or has expired" in err
        assert rows(output / "traces.jsonl") == []
        monkeypatch.setenv("OPENAI_API_KEY", server.key)
        assert distill(teacher(server), output)["done"] == 8


def test_failed_questions_are_asked_again_on_request(tmp_path: Path) -> None:
    with serving({NAMES[0]: ["400"], NAMES[1]: ["400", "400"]}) as server:
        output = write_questions(tmp_path, NAMES)
        assert distill(teacher(server), output)["failed"] == 2
        assert distill(teacher(server), output)["failed"] == 2
        assert distill(teacher(server, retry_failed=True), output) == {"done": 7, "failed": 1, "unasked": 0}
        check_ended(output, {NAMES[1]: ["400"]}, NAMES)
        assert server.asked == {**dict.fromkeys(NAMES, 1), NAMES[0]: 2, NAMES[1]: 2}


def test_questions_that_come_and_go(tmp_path: Path) -> None:
    with serving() as server:
        distill(teacher(server), write_questions(tmp_path, NAMES[:4]))
        assert distill(teacher(server), write_questions(tmp_path, NAMES[2:])) == {"done": 6, "failed": 0, "unasked": 0}
        check_ended(tmp_path, {}, NAMES[2:])
        distill(teacher(server), write_questions(tmp_path, NAMES))
        check_ended(tmp_path, {}, NAMES)
        assert server.asked == dict.fromkeys(NAMES, 1)


def test_the_teacher_that_is_not_there_fails_every_question(tmp_path: Path) -> None:
    with serving() as server:
        pass
    output = write_questions(tmp_path, NAMES)
    assert distill(teacher(server), output) == {"done": 0, "failed": 8, "unasked": 0}
    reasons = {row["reason"] for row in rows(output / "traces.jsonl")}
    assert len(reasons) == 1
    assert reasons.pop().startswith("connection lost: ")


def test_a_full_disk_leaves_earlier_answers_intact(tmp_path: Path) -> None:
    def long_answer(content: str) -> dict[str, Any]:
        return {"content": "a" * 3000, "reasoning_content": "b" * 3000}

    names = [f"question {i}" for i in range(30)]
    with small_disk(tmp_path / "disk", "300k") as disk, serving(reply=long_answer) as server:
        output = write_questions(disk / "run", names)
        (disk / "filler").write_bytes(b"-" * 200_000)
        with pytest.raises(WriteError) as error:
            distill(teacher(server, concurrency=1), output)
        assert str(error.value) == f"{output}/responses.jsonl: No space left on device; the lines before are intact"
        kept = [row["id"] for row in rows(output / "responses.jsonl")]
        assert len(kept) > 3
        with pytest.raises(WriteError, match="No space left on device"):
            distill(teacher(server, concurrency=1), output)
        assert [row["id"] for row in rows(output / "responses.jsonl")][: len(kept)] == kept
        (disk / "filler").unlink()
        with pytest.raises(WriteError, match=r"traces\.jsonl: No space left on device"):
            distill(teacher(server), output)
        assert not list(output.glob(".*.partial"))
        subprocess.run(["mount", "-o", "remount,size=2m", disk], check=True)
        asked = server.asked.copy()
        assert distill(teacher(server), output)["done"] == 30
        assert server.asked == asked
        assert all(server.asked[name] == 1 for name in kept)


def test_the_key_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_LOG", "debug")
    faults = [*TRANSIENT[:4], *RUBBISH, *FINAL]
    names = [f"question {fault}" for fault in faults] + ["question good"]

    def echoing(content: str) -> dict[str, Any]:
        return {"content": f"It is {KEY}", "reasoning_content": f"Bearer {KEY}"}

    with serving({f"question {fault}": [fault] * 9 for fault in faults}, echoing) as server:
        server.echo = True
        output = write_questions(tmp_path / "run", names)
        first = run_distill(output, server)
        wait_until(lambda: bool(server.asked), [first])
        title = " ".join(psutil.Process(first.pid).cmdline()).encode()
        said = [*first.communicate()]
        assert first.returncode == 0
        for fault in FATAL:
            write_questions(output, [*names, fault])
            server.faults = {fault: [fault]}
            process = run_distill(output, server)
            said += process.communicate()
            assert process.returncode == 1
    # That the server has it, and repeats it, is what makes the rest of this test mean something.
    files = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert sum(b"[key]" in content for content in files.values()) == 2
    assert "[key]" in "".join(said)
    for content in [title, *files.values(), *(text.encode() for text in said)]:
        assert KEY.encode() not in content
        assert b"PLANTED" not in content


@pytest.mark.parametrize("tail", ["\n", " and more", "é", '"'])
def test_a_key_that_no_header_takes_is_not_repeated(
    tail: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY + tail)
    with serving() as server:
        output = write_questions(tmp_path, NAMES[:1])
        if tail == "\n":
            assert distill(teacher(server), output)["done"] == 1
            return
        with pytest.raises(ValueError, match="OPENAI_API_KEY holds characters that no key has") as error:
            distill(teacher(server), output)
        assert KEY not in str(error.value) + caplog.text
        with pytest.raises(ValueError, match="the variable it names is not set") as error:
            distill(teacher(server, api_key_env=KEY), output)
        assert KEY not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": None, "model": None}, "distill.endpoint.base_url: required\ndistill.endpoint.model: required"),
        ({"base_url": "localhost:80"}, "distill.endpoint.base_url: expected a URL"),
        ({"base_url": "http://me:secret@localhost/v1"}, "without a password"),
        ({"max_cost": 1.0}, "distill.endpoint.max_cost: it says nothing without price_in and price_out"),
        ({"api_key_env": "NO_SUCH_KEY"}, "distill.endpoint.api_key_env: NO_SUCH_KEY is not set"),
    ],
)
def test_a_section_that_cannot_be_used(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with serving() as server:
        with pytest.raises(ValueError, match="endpoint") as error:
            distill(teacher(server, **changes), write_questions(tmp_path, NAMES))
        assert message in str(error.value)
        assert "secret" not in str(error.value)
        assert not server.asked


def test_questions_that_are_not_there_or_not_right(tmp_path: Path) -> None:
    with serving() as server:
        with pytest.raises(InputError, match=r"questions\.jsonl: not there; run the stage collect first"):
            distill(teacher(server), tmp_path)
        (tmp_path / "questions.jsonl").write_text('{"id": "a", "question": "b"}\n{"id": "a", "question": ""}\n')
        with pytest.raises(InputError) as error:
            distill(teacher(server), tmp_path)
        assert "line 2: question: expected a text, found str ''" in str(error.value)
        assert "line 2: id 'a' is that of an earlier line too" in str(error.value)
