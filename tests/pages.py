"""A report's page in a real browser."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    # With no host to be found, whatever the page would fetch fails, but from a server of the test's own.
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-background-networking",
        f"--user-data-dir={tmp_path}",
    ):
        options.add_argument(argument)
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


def check_numbers(browser: webdriver.Chrome, directory: Path, task: str) -> None:
    """Open an evaluation's page; its table and pictures are those of the summary beside it."""
    browser.get((directory / "report.html").as_uri())
    summary = json.loads((directory / "summary.json").read_text())["tasks"][task]
    assert browser.title == "Test-time scaling"
    for name, run in summary["runs"].items():
        cells = browser.find_elements(By.CSS_SELECTOR, f'td[data-run="{name}"]')
        shown = {cell.get_attribute("data-column"): cell.text for cell in cells}
        accuracy = run["accuracy"]
        expected = [f"{100 * accuracy[key]:.1f}%" for key in ("value", "low", "high")]
        assert re.findall(r"[\d.]+%", shown["accuracy"]) == expected
        assert float(shown["thinking_tokens"]) == pytest.approx(run["thinking_tokens"], abs=0.051)
        assert int(shown["samples"]) == run["samples"]
    for method, figures in summary["methods"].items():
        control = browser.find_element(By.CSS_SELECTOR, f'tr[data-method="{method}"] td:nth-child(2)').text
        assert float(control.rstrip("%")) == pytest.approx(100 * figures["control"], abs=0.05)
    assert len(browser.find_elements(By.CSS_SELECTOR, "figure svg")) == 3
