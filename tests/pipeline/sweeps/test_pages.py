"""A sweep on the MLflow pages, as people see it, in headless Chromium driven by the WebDriver protocol.

`make screenshots` runs this on a real sweep (TATOK_STORE) and keeps pictures for docs/ (TATOK_SCREENSHOTS).
"""

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(900)]
TRIALS, BY = "tags.stage = 'trial'", "metrics.`objective`"  # what one types to see trials, best first
SECONDS = 240  # for a page to show what it should
ENTER, ESCAPE = "\ue007", "\ue00c"  # keys of the WebDriver protocol
SWITCHES = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars", "--window-size=1500,1300",
    "--disable-background-networking", "--disable-sync", "--disable-component-update",
)  # fmt: skip


class Browser:
    """One page."""

    def __init__(self, address: str, binary: str, folder: Path) -> None:
        self._driver = address
        options = {"binary": binary, "args": [*SWITCHES, f"--user-data-dir={folder}"]}
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        self._session = f"/session/{self._ask('/session', wanted)['sessionId']}"

    def _ask(self, path: str, values: dict[str, Any] | None = None, method: str = "POST") -> Any:
        data = None if values is None else json.dumps(values).encode()
        request = urllib.request.Request(self._driver + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return json.load(answer)["value"]

    def open(self, url: str) -> None:
        self._ask(f"{self._session}/url", {"url": url})

    def run(self, script: str) -> Any:
        return self._ask(f"{self._session}/execute/sync", {"script": script, "args": []})

    def wait(self, script: str, what: str) -> Any:
        """Until the script returns something that is true."""
        limit = time.monotonic() + SECONDS
        while not (found := self.run(script)):
            assert time.monotonic() < limit, f"{what} did not appear; the page says: {self.text()[:3000]}"
            time.sleep(0.5)
        return found

    def text(self) -> str:
        return str(self.run("return document.body.innerText"))

    def wait_for(self, *texts: str) -> None:
        for text in texts:
            self.wait(f"return document.body.innerText.includes({json.dumps(text)})", text)

    def click(self, element: str, what: str) -> None:
        """On what a JavaScript expression finds, once it is there."""
        self.wait(f"const found = {element}; found?.click(); return Boolean(found)", what)

    def choose(self, number: int, text: str) -> None:
        """An entry of the page's list of that number, from 0, by its name."""
        elements = self._ask(f"{self._session}/elements", {"using": "css selector", "value": "input[role=combobox]"})
        (element,) = elements[number].values()
        self._ask(f"{self._session}/element/{element}/value", {"text": text + ENTER + ESCAPE})

    def keep(self, name: str) -> None:
        """The picture for docs/, where one is wanted."""
        if folder := os.environ.get("TATOK_SCREENSHOTS"):
            self.run("document.querySelector('button[aria-label=\"Close\"]')?.click()")  # the assistant: a fourth of it
            hide = "style.textContent = '.modebar-container {display: none}'"  # there without a mouse on the chart, too
            self.run(f"const style = document.createElement('style'); {hide}; document.head.append(style)")
            time.sleep(5)  # for charts to be drawn
            picture = self._ask(f"{self._session}/screenshot", method="GET")
            (Path(folder) / name).write_bytes(base64.b64decode(picture))

    def close(self) -> None:
        self._ask(self._session, method="DELETE")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_until_it_answers(address: str, process: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + SECONDS
    while time.monotonic() < limit:
        assert process.poll() is None, f"{address} ended"
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"{address} did not answer")


def serving(command: list[str], address: str, folder: Path) -> Iterator[None]:
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=folder, stdout=quiet, stderr=quiet)
    try:
        wait_until_it_answers(address, process)
        yield
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture
def browser(tmp_path: Path, chromium: str) -> Iterator[Browser]:
    chromedriver = shutil.which("chromedriver")
    if chromedriver is None:
        pytest.skip("needs Chromium's driver, which is absent here (on Debian and Ubuntu: apt install chromium-driver)")
    address = f"http://127.0.0.1:{free_port()}"
    driver = serving([chromedriver, f"--port={address.rpartition(':')[2]}"], f"{address}/status", tmp_path)
    next(driver)
    made = Browser(address, chromium, tmp_path / "user")
    yield made
    made.close()
    next(driver, None)


@pytest.fixture
def store(configure: Any, fake_tune: Any, tmp_path: Path) -> str:
    """A store with a sweep: that of `make screenshots`, or a pretended one."""
    if found := os.environ.get("TATOK_STORE"):
        return found
    from pipeline.core.run import Run
    from pipeline.sweeps import sweep

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run = Run.open("sweep", configure(f"tracking.uri={uri}", "tracking.system_metrics=false"), "sweep", resume=False)
    sweep.run(run)
    run.write_summary("finished", exit_code=0)
    run.close()
    return uri


@pytest.fixture
def server(store: str, tmp_path: Path) -> Iterator[str]:
    address = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", address.rpartition(":")[2]]
    running = serving([*command, "--workers", "1", "--backend-store-uri", store], f"{address}/health", tmp_path)
    next(running)
    yield address
    next(running, None)


def sweep_in(store: str) -> tuple[str, str, list[Any]]:
    """The experiment, the name of its newest sweep, and that one's children."""
    from mlflow import MlflowClient

    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("tatok").experiment_id
    (parent, *_) = client.search_runs([experiment], "tags.stage = 'sweep'")
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    return experiment, parent.info.run_name, children


def row(name: str, part: str) -> str:
    """The part of a run's row in the table of runs, as a JavaScript expression; several rows are drawn for each run."""
    return (
        f"[...document.querySelectorAll('.ag-row')].filter(row => row.innerText.includes({json.dumps(name)}))"
        f".map(row => row.querySelector({json.dumps(part)})).find(Boolean)"
    )


def test_children_are_compared_by_curves_and_parameters_that_bear_their_names(browser, server, store):
    experiment, sweep, children = sweep_in(store)
    names = sorted(child.info.run_name for child in children)
    assert len(children) == 3
    runs = f"{server}/#/experiments/{experiment}/runs"
    browser.open(runs)
    browser.click(row(sweep, "[col-id='attributes.`Run Name`'] button"), "the sweep, to be unfolded")
    for name in names:
        browser.click(row(name, "input.ag-checkbox-input"), name)
    browser.click("document.querySelector('[data-testid=runs-compare-button]')", "Compare")
    browser.wait_for("Comparing 3 Runs", *names, "tokenizer.global_tokens", "curve/psnr", "objective")
    browser.click("[...document.querySelectorAll('button')].find(one => one.innerText === 'Clear All')", "Clear All")
    browser.choose(0, "tokenizer.global_tokens")
    browser.choose(1, "objective")
    browser.run("document.querySelectorAll('button[role=switch]').forEach(one => one.click())")  # Show diff only
    browser.wait("return document.querySelector('.parcoords')", "a plot of the choice")
    browser.keep("sweep_compare.png")
    browser.open(f"{runs}?compareRunsMode=CHART&searchFilter={quote(TRIALS)}&orderByKey={quote(BY)}&orderByAsc=false")
    browser.wait_for("3 matching runs")  # sorted by a metric, runs are not folded into their parents
    cards = "[...document.querySelectorAll('[data-testid=experiment-view-compare-runs-card]')]"
    card = f"{cards}.find(card => card.innerText.startsWith('curve/psnr'))"
    lines = f"new Set([...{card}?.querySelectorAll('path.js-line') ?? []].map(line => line.getAttribute('d')))"
    browser.wait(f"{card}?.scrollIntoView({{block: 'center'}}); return {lines}.size === 3", "a line for each trial")
    legend = browser.run(f"return {card}.innerText")
    assert [name for name in names if f"{name} (curve/psnr)" in legend] == names
    browser.keep("sweep_curves.png")
    browser.open(f"{runs}/{children[0].info.run_id}/model-metrics")
    browser.wait_for("curve", "curve/psnr")
