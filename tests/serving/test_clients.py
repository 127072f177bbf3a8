"""Other clients than openai's: curl, the evaluation harness, a browser; and every name that a budget has."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.pages import browser
from tests.server import QUESTION, Server, running

__all__ = ["browser"]

BUDGETS = [
    {"max_thinking_tokens": 6},
    {"thinking_token_budget": 6},
    {"thinking_budget": 6},
    {"thinking_budget_tokens": 6},
    {"reasoning": {"max_tokens": 6}},
    {"thinking": {"type": "enabled", "budget_tokens": 6}},
    {"reasoning_effort": "low"},
    {"reasoning": {"effort": "low"}},
]


@pytest.fixture(scope="module")
def efforts(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(model, tmp_path_factory.mktemp("efforts") / "log", ["efforts.low=6"]) as server:
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("place", ["", "extra_body", "chat_template_kwargs"])
def test_a_budget_holds_under_every_name_and_in_every_place(efforts: Server, place: str) -> None:
    with efforts.client as client:
        for budget in BUDGETS:
            asked = {place: budget} if place else budget
            body = {"messages": QUESTION, "min_thinking_tokens": 6, "max_answer_tokens": 1, **asked}
            answer = client.post("/v1/chat/completions", json=body).json()
            assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 6, (budget, answer)
        for none in ({"reasoning": {"enabled": False}}, {"thinking": {"type": "disabled"}}, {"enable_thinking": False}):
            body = {"messages": QUESTION, "max_answer_tokens": 1, **({place: none} if place else none)}
            answer = client.post("/v1/chat/completions", json=body).json()
            assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0, (none, answer)
        hidden = {"reasoning": {"max_tokens": 6, "exclude": True}}
        body = {"messages": QUESTION, "max_answer_tokens": 3, **({place: hidden} if place else hidden)}
        message = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
        assert message["reasoning"] is None
        assert message["content"]


def test_curl_reads_a_stream(server: Server) -> None:
    body = {"messages": QUESTION, "thinking_budget": 5, "min_thinking_tokens": 5, "max_answer_tokens": 4}
    words = ["curl", "-sSN", f"{server.url}/v1/chat/completions", "-H", "content-type: application/json"]
    words += ["-d", json.dumps({**body, "stream": True, "mark_forced": True, "seed": 1})]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    events = [line.removeprefix("data: ") for line in done.stdout.split("\n") if line]
    assert events[-1] == "[DONE]"
    parts = [part["choices"][0] for part in map(json.loads, events[:-1])]
    assert parts[-1]["finish_reason"] in ("stop", "length")
    assert parts[-1]["s1jax"] == {
        "thinking_end": "budget",
        "num_waits": 0,
        "num_forced_tokens": parts[-1]["s1jax"]["num_forced_tokens"],
    }
    marks = [part["s1jax"]["forced"] for part in parts[:-1] if part["delta"].get("reasoning")]
    assert marks
    assert not any(marks), "the thinking is the model's own"


@pytest.mark.slow
def test_the_harness_asks_it(server: Server, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"q": f"{i} + 4", "a": "7"}) + "\n" for i in range(3)))
    (tmp_path / "sums.yaml").write_text(
        f"""task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "How many is {{{{q}}}}?"
doc_to_target: "{{{{a}}}}"
generation_kwargs: {{until: [], max_gen_toks: 40, thinking_budget: 7, min_thinking_tokens: 7}}
metric_list: [{{metric: exact_match}}]
"""
    )
    arguments = f"model=tiny,base_url={server.url}/v1/chat/completions,num_concurrent=2,tokenized_requests=False"
    words = ["--model", "local-chat-completions", "--model_args", arguments, "--apply_chat_template"]
    words += ["--tasks", "sums", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    with server.client as client:
        before = _counted(client.get("/metrics").text)
        command = [sys.executable, "-m", "lm_eval", *words, "--log_samples"]
        done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert _counted(client.get("/metrics").text) - before == 3 * 7
    logged = [json.loads(line) for file in tmp_path.glob("out/**/samples*.jsonl") for line in file.open()]
    assert len(logged) == 3


def _counted(metrics: str) -> float:
    line = next(line for line in metrics.splitlines() if line.startswith("s1jax_thinking_tokens_total "))
    return float(line.split()[1])


@pytest.mark.slow
def test_the_page_shows_two_budgets_side_by_side(server: Server, browser: webdriver.Chrome) -> None:
    browser.get(server.url)
    sides = browser.find_elements(By.CLASS_NAME, "side")
    for side, most in zip(sides, (16, 48), strict=True):
        for name, value in (("maximum", most), ("minimum", most), ("waits", 0)):
            slider = side.find_element(By.NAME, name)
            set_value = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'));"
            browser.execute_script(set_value, slider, value)
            assert side.find_element(By.CSS_SELECTOR, f"[name={name}] + output").text == str(value)
    browser.find_element(By.ID, "question").clear()
    browser.find_element(By.ID, "question").send_keys("<img src=x onerror=\"document.title='run'\">")
    browser.find_element(By.ID, "ask").click()
    WebDriverWait(browser, 60).until(lambda _: all("in all" in figures(side) for side in sides))
    for side, most in zip(sides, (16, 48), strict=True):
        assert figures(side).startswith(f"{most} thinking tokens, ended by budget, 0 waits")
        assert side.find_elements(By.CSS_SELECTOR, "pre .reasoning:not(.forced)")
        assert not side.find_elements(By.CSS_SELECTOR, "pre *:not(span)"), "what a model writes is text"
    assert browser.title == "Thinking budgets"
    assert not [entry for entry in browser.get_log("browser") if "favicon" not in entry["message"]]


def figures(side: Any) -> str:
    """The line below an answer."""
    return str(side.find_element(By.CLASS_NAME, "figures").text)
