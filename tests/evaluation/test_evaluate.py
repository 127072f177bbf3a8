"""decode.py evaluate from a task to its report, and the report in a browser."""

import json
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import datasets
import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from s1jax.evaluation.tasks import load_task
from s1jax.jsonl import InputError
from tests.decoding.conftest import CONFIG, ROOT, environment
from tests.pages import browser, check_numbers
from tests.processes import wait_until
from tests.tiny import model_directory

__all__ = ["browser"]
MARKUP = "<script>document.title='broken'</script><b>&amp; </script>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("evaluate") / "model", {**CONFIG, "max_position_embeddings": 512})


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks") / "sums.jsonl"
    rows = [{"problem": f"What is {i} + 3?", "answer": str(i + 3)} for i in range(11)]
    rows.append({"id": "markup", "problem": f"What is {MARKUP}?", "answer": "\\frac{1}{2}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(model: Path, task: Path, output: Path) -> list[str]:
    return [
        *[sys.executable, "decode.py", "evaluate", f"model.path={model}", "model.dtype=float32", f"tasks={task}"],
        *[f"output_dir={output}", "max_total_tokens=200", "budget.max_answer_tokens=8", "batch_size=16"],
        *["sweep.max_thinking_tokens=0,4,16,auto", "sweep.num_ignore=0,2", "sampling.temperature=1"],
        *["sampling.num_samples=2", "sweep.baselines=rejection,step_conditional", "sweep.max_tries=3"],
    ]


@pytest.fixture(scope="module")
def evaluated(model: Path, task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("evaluated") / "run"
    command = words(model, task, output)
    process = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return output


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]


def in_order(output: Path) -> list[str]:
    return sorted(json.dumps(line, sort_keys=True) for line in lines(output))


@pytest.mark.slow
def test_every_run_answers_every_question_within_its_budget(evaluated: Path) -> None:
    counts: dict[str, int] = defaultdict(int)
    for line in lines(evaluated):
        counts[line["run"]] += 1
        bound = re.fullmatch(r"(?:at most|rejected over) (\d+)", line["run"])
        if bound:
            assert line["num_thinking_tokens"] <= int(bound[1])
        # A random model may write what nobody can grade; then the line says why.
        assert line["verdict"] in ("right", "wrong") or (line["verdict"] == "ungraded" and line["reason"])
        assert line["num_waits"] <= (2 if line["run"] == "2 x 'Wait'" else 0)
    both = {"at most 0", "at most 4", "at most 16", "unlimited", "2 x 'Wait'", "told 1 steps"}
    assert {name: counts[name] for name in both} == dict.fromkeys(both, 24)
    for bound in (0, 4, 16):
        assert 12 <= counts[f"rejected over {bound}"] <= 36


@pytest.mark.slow
def test_the_summary_is_what_the_samples_say(evaluated: Path) -> None:
    summary = json.loads((evaluated / "summary.json").read_text())
    figures = summary["tasks"]["sums"]
    by_run: dict[str, list[dict]] = defaultdict(list)
    for line in lines(evaluated):
        by_run[line["run"]].append(line)
    for name in ("at most 0", "at most 16", "unlimited", "2 x 'Wait'"):
        run, samples = figures["runs"][name], by_run[name]
        assert run["accuracy"]["value"] == pytest.approx(np.mean([s["verdict"] == "right" for s in samples]))
        assert run["accuracy"]["low"] <= run["accuracy"]["value"] <= run["accuracy"]["high"]
        assert run["thinking_tokens"] == pytest.approx(np.mean([s["num_thinking_tokens"] for s in samples]))
        assert list(run["pass_at_k"]) == ["1", "2"]
        right = defaultdict(bool)
        for sample in samples:
            right[sample["id"]] |= sample["verdict"] == "right"
        assert run["pass_at_k"]["2"] == pytest.approx(np.mean(list(right.values())))
    budget = figures["methods"]["budget"]
    assert budget["runs"] == ["at most 0", "at most 4", "at most 16", "unlimited"]
    assert budget["control"] == 1
    assert budget["performance"] == max(figures["runs"][name]["accuracy"]["value"] for name in budget["runs"])
    assert figures["methods"]["wait"]["runs"] == ["unlimited", "2 x 'Wait'"]
    rejected = figures["runs"]["rejected over 16"]
    assert rejected["samples"] == 12  # One counts of each question's tries.


@pytest.mark.slow
def test_runs_that_share_what_they_have_in_common_have_the_answers_of_each_alone(
    model: Path, task: Path, evaluated: Path, tmp_path: Path
) -> None:
    command = [*words(model, task, tmp_path / "run"), "sweep.share=false"]
    process = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert in_order(evaluated) == in_order(tmp_path / "run")
    shared, alone = (json.loads((path / "summary.json").read_text()) for path in (evaluated, tmp_path / "run"))
    assert shared["tasks"] == alone["tasks"]
    held = sum(len(line["output_ids"]) for line in lines(evaluated))
    assert alone["decoded"] == {"tokens": held, "of": held}
    assert shared["decoded"]["of"] == held
    assert shared["decoded"]["tokens"] < 0.75 * held


@pytest.mark.slow
def test_killed_and_started_again_the_answers_are_the_same(
    model: Path, task: Path, evaluated: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    command = words(model, task, output)
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
    samples = output / "samples.jsonl"
    wait_until(lambda: samples.exists() and len(samples.read_bytes().splitlines()) >= 20, [process])
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(lines(output)) < len(lines(evaluated))
    assert subprocess.run(command, cwd=ROOT, env=environment(), check=False).returncode == 0
    assert in_order(output) == in_order(evaluated)
    other = [*command, "sampling.seed=8"]
    refused = subprocess.run(other, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "written with other values of sampling" in refused.stderr


@pytest.mark.slow
def test_the_page_shows_the_summary_and_the_answers_as_text(evaluated: Path, browser: webdriver.Chrome) -> None:
    check_numbers(browser, evaluated, "sums")
    kept = [line for line in lines(evaluated) if line["id"] == "markup" and line["run"] == "2 x 'Wait'"]
    Select(browser.find_element(By.ID, "run")).select_by_value("2 x 'Wait'")
    browser.find_element(By.ID, "search").send_keys("document.title")
    assert browser.find_element(By.ID, "count").text == f"1 to {len(kept)} of {len(kept)} answers"
    browser.find_element(By.CSS_SELECTOR, "#list summary").click()
    details = browser.find_element(By.CSS_SELECTOR, "#list details")
    assert details.find_element(By.CSS_SELECTOR, "pre").get_property("textContent") == f"What is {MARKUP}?"
    spans = details.find_elements(By.CSS_SELECTOR, "pre:nth-of-type(2) span")
    texts = "".join(span.get_property("textContent") for span in spans)
    assert texts in [line["text"] for line in kept]
    waits = [span for span in spans if span.get_attribute("class") == "wait"]
    assert sum(wait.get_property("textContent").count("Wait") for wait in waits) == max(
        line["num_waits"] for line in kept if line["text"] == texts
    )
    assert browser.find_elements(By.CSS_SELECTOR, "#list b:not(.right):not(.wrong):not(.ungraded)") == []
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.mark.slow
def test_a_thousand_long_transcripts_are_no_burden(evaluated: Path, browser: webdriver.Chrome, tmp_path: Path) -> None:
    page = (evaluated / "report.html").read_text()
    match = re.search(r'id="samples">(.*?)</script>', page, flags=re.DOTALL)
    assert match
    sample = json.loads(match[1])[0]
    sample["parts"] = [["thinking", "So I add the two and check. Wait. " * 600], ["answer", "Final Answer: 7"]]
    many = [{**sample, "id": str(i)} for i in range(1000)]
    many[777]["parts"] = [["thinking", "a needle"]]
    large = tmp_path / "large.html"
    large.write_text(page.replace(match[1], json.dumps(many).replace("<", "\\u003c")))
    started = time.monotonic()
    browser.get(large.as_uri())
    assert browser.find_element(By.ID, "count").text == "1 to 50 of 1000 answers"
    browser.find_element(By.ID, "on").click()
    assert browser.find_element(By.ID, "count").text == "51 to 100 of 1000 answers"
    browser.find_element(By.ID, "search").send_keys("needle")
    assert browser.find_element(By.ID, "count").text == "1 to 1 of 1 answers"
    assert time.monotonic() - started < 15
    assert len(browser.find_elements(By.CSS_SELECTOR, "#list details")) == 1


def test_options_are_shuffled_by_seed_and_answers_are_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {
        "Question": "Which?",
        "Correct Answer": "right",
        **{f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)},
    }
    asked = []

    def load_dataset(path: str, name: str | None, split: str) -> list[dict]:
        asked.append((path, name, split))
        return [row] * 40

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    questions = load_task("gpqa_diamond", seed=1, limit=None)
    assert asked == [("Idavidrein/gpqa", "gpqa_diamond", "train")]
    assert {question.answer for question in questions} == set("ABCD")
    for question in questions:
        assert question.kind == "choice"
        assert f"\n{question.answer}) right" in question.text
        assert question.text.startswith("Which?\n\nA) ")
    assert questions == load_task("gpqa_diamond", seed=1, limit=None)
    assert questions != load_task("gpqa_diamond", seed=2, limit=None)
    del row["Incorrect Answer 2"]
    with pytest.raises(InputError, match="row 1: Incorrect Answer 2: expected a text, found null"):
        load_task("gpqa_diamond", seed=1, limit=None)


def test_gsm8k_answers_are_what_follows_the_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"question": "How many?", "answer": "2 + 2 = 4\n#### 1,024"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, split: rows)
    (question,) = load_task("gsm8k", seed=0, limit=5)
    assert (question.text, question.answer, question.kind) == ("How many?", "1,024", "math")


def test_every_bad_row_of_a_task_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text('{"problem": "a", "answer": 3}\n{"problem": " ", "answer": "3"}\n{"problem": "a"}\nno\n')
    with pytest.raises(InputError) as error:
        load_task(str(path), seed=0, limit=None)
    text = str(error.value)
    assert "3 problems" in text
    assert "line 2: problem: expected a text, found str ' '" in text
    assert "line 3: answer: expected a text, found null" in text
    assert "line 4: not JSON" in text
    with pytest.raises(InputError, match=r"nothing: neither a file nor a known task \(aime24,"):
        load_task("nothing", seed=0, limit=None)
