"""What a run may cost, how long it waits, how much it asks at once, and what it shows of that."""

import itertools
import os
import re
import tempfile
import termios
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1jax.curation.distill import distill
from tests.curation.conftest import rows, write_questions
from tests.curation.server import ANSWER_TOKENS, PROMPT_TOKENS, serving
from tests.curation.test_distill import NAMES, run_distill, teacher

TOKENS = PROMPT_TOKENS + ANSWER_TOKENS
PRICE = 1e6 / TOKENS
"""At which an answer costs 1."""
MOST = len(f"{NAMES[0]}\nin a box") + 100 + 100
"""Tokens that a question may take: its bytes, the template's and max_tokens."""


@settings(max_examples=15)
@given(
    cap=st.floats(0, 30),
    faults=st.dictionaries(
        st.sampled_from(NAMES), st.lists(st.sampled_from(["half", "half JSON", "HTML", "schema"]), max_size=2)
    ),
)
def test_the_cap_on_cost_is_never_exceeded(cap: float, faults: dict[str, list[str]]) -> None:
    with tempfile.TemporaryDirectory() as directory, serving(faults) as server:
        output = write_questions(Path(directory), NAMES)
        prices = {"price_in": PRICE, "price_out": PRICE}
        for share in (0.5, 1.0):
            counts = distill(teacher(server, max_cost=cap * share, **prices), output)
            spent = sum(row["cost"] for row in rows(output / "responses.jsonl"))
            assert server.billed <= spent <= cap * share
            if not faults:
                assert counts["unasked"] == 0 or spent + MOST / TOKENS > cap * share
            assert len(rows(output / "traces.jsonl")) == len(NAMES) - counts["unasked"]
        answered = server.answered.copy()
        counts = distill(teacher(server, max_cost=1e6, **prices), output)
        assert counts["unasked"] == 0
        assert all(server.answered[name] == 1 for name in answered.elements())
        total = sum(row["cost"] for row in rows(output / "responses.jsonl"))
        assert sum(row["cost"] for row in rows(output / "traces.jsonl")) == pytest.approx(total)
        assert total >= server.billed


def test_the_cap_on_tokens_stops_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as server:
        output = write_questions(tmp_path, NAMES)
        cap = 4 * TOKENS + MOST
        counts = distill(teacher(server, max_total_tokens=cap), output)
        assert counts == {"done": 5, "failed": 0, "unasked": 3}
        assert sum(server.asked.values()) == 5
        said = capsys.readouterr().err
        assert f"a cap is reached (a question may take up to {MOST} tokens, 0.0000): raise it" in said
        assert distill(teacher(server, max_total_tokens=cap + TOKENS), output)["unasked"] == 2


def test_an_answer_that_does_not_say_its_tokens_counts_as_the_longest(tmp_path: Path) -> None:
    with serving() as server:
        server.usage = False
        output = write_questions(tmp_path, NAMES)
        counts = distill(teacher(server, max_total_tokens=3 * MOST), output)
        assert counts == {"done": 3, "failed": 0, "unasked": 5}
        assert {(row["prompt_tokens"], row["completion_tokens"]) for row in rows(output / "traces.jsonl")} == {(0, 0)}


def test_an_answer_that_drips_is_given_up(tmp_path: Path) -> None:
    with serving({NAMES[0]: ["drip"] * 2}) as server:
        output = write_questions(tmp_path, NAMES[:1])
        distill(teacher(server, timeout=0.5, max_retries=1), output)
        (row,) = rows(output / "traces.jsonl")
        assert (row["status"], row["reason"]) == ("failed", "no answer within 0.5 s")


@pytest.mark.parametrize("concurrency", [1, 3])
def test_so_many_questions_are_under_way(concurrency: int, tmp_path: Path) -> None:
    with serving() as server:
        server.delay = 0.1
        distill(teacher(server, concurrency=concurrency), write_questions(tmp_path, NAMES))
        assert server.most_under_way == concurrency


def test_waits_double_up_to_their_longest(tmp_path: Path) -> None:
    with serving({NAMES[0]: ["500"] * 4}) as server:
        output = write_questions(tmp_path, NAMES[:1])
        distill(teacher(server, max_retries=4, backoff=0.2, max_backoff=0.5), output)
        times = server.times[NAMES[0]]
        waits = [after - before for before, after in itertools.pairwise(times)]
        assert len(waits) == 4
        # The least is half of each wait; what a busy machine adds has no bound.
        assert all(wait >= least for wait, least in zip(waits, (0.1, 0.2, 0.25, 0.25), strict=True))
        assert rows(output / "traces.jsonl")[0]["status"] == "done"


def test_the_request_has_what_the_section_says(tmp_path: Path) -> None:
    with serving() as server:
        section = teacher(server, max_tokens_key="max_completion_tokens", extra_body={"temperature": 0.5, "a": [1]})
        distill(section, write_questions(tmp_path, NAMES[:1]))
        assert server.bodies == [
            {
                "model": "teacher",
                "messages": [{"role": "user", "content": f"{NAMES[0]}\nin a box"}],
                "max_completion_tokens": 100,
                "temperature": 0.5,
                "a": [1],
            }
        ]


def test_the_bar_shows_the_money_spent(tmp_path: Path) -> None:
    leader, follower = os.openpty()
    termios.tcsetwinsize(follower, (24, 120))
    with serving() as server:
        server.delay = 0.2
        output = write_questions(tmp_path, NAMES)
        process = run_distill(output, server, follower, price_in=PRICE, price_out=PRICE, concurrency=1)
        os.close(follower)
        shown = b""
        while True:
            try:
                shown += os.read(leader, 4096)
            except OSError:  # The other end is closed.
                break
        process.communicate()
        os.close(leader)
    amounts = [float(amount) for amount in re.findall(r"(\d+\.\d{4}) spent\]", shown.decode())]
    assert amounts == sorted(amounts)
    assert len(set(amounts)) > 3
    assert set(amounts) <= {float(n) for n in range(9)}
