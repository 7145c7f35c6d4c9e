"""The page of marnet-serve in a browser: a photograph is dropped, and its labels appear."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from serving import Played, running
from waiting import until

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"no browser here: none of {', '.join(BROWSERS)}"),
]


class Page:
    """A page in a browser, by the Chrome DevTools Protocol over a pipe."""

    def __init__(self, requests: Any, answers: Any) -> None:
        self._requests, self._answers = requests, answers
        self._number, self._session = 0, None
        self.events: list[dict[str, Any]] = []

    def open(self, url: str) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "DOM", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=url)
        until(lambda: self.run("document.readyState") == "complete")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        request = {"id": self._number, "method": method, "params": params}
        if self._session:
            request["sessionId"] = self._session
        self._requests.write(json.dumps(request).encode() + b"\0")
        while True:
            answer = json.loads(self._next())
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> bytes:
        read = b""
        while not read.endswith(b"\0"):
            byte = self._answers.read(1)
            assert byte, "the browser ended"
            read += byte
        return read[:-1]

    def run(self, script: str) -> Any:
        return self.call("Runtime.evaluate", expression=script)["result"].get("value")

    def text(self, name: str) -> str:
        return self.run(f"document.getElementById('{name}').innerText")

    def choose(self, file: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node)

    def drop(self, file: Path) -> None:
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=100, y=120, data=data)

    def complaints(self) -> list[str]:
        """What the browser's console says of errors, such as of what the policy forbids."""
        entries = [e["params"]["entry"] for e in self.events if e.get("method") == "Log.entryAdded"]
        return [entry["text"] for entry in entries if "401" not in entry["text"]]

    def asked(self) -> set[str]:
        sent = [e for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return {event["params"]["request"]["url"] for event in sent}


@contextmanager
def browser(home: Path) -> Iterator[Page]:
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    flags = f"--no-sandbox --disable-gpu --headless --remote-debugging-pipe --user-data-dir={home}"
    shell = f'exec "{BROWSER}" {flags} 3<&{theirs_in} 4>&{theirs_out}'
    with subprocess.Popen(
        ["bash", "-c", shell],
        pass_fds=(theirs_in, theirs_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        os.close(theirs_in)
        os.close(theirs_out)
        with open(ours_out, "wb", buffering=0) as requests, open(ours_in, "rb") as answers:
            try:
                yield Page(requests, answers)
            finally:
                process.kill()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("browser")) as page:
        yield page


def test_a_photograph_that_is_dropped_or_chosen_gets_its_labels(page, photographs, tmp_path):
    with running(Played) as server:
        page.open(f"{server.url}/")
        page.drop(photographs[0])
        until(lambda: "<b>two</b>" in page.text("answer"))
        shown = page.text("answer")
        assert "50.0 %" in shown
        assert "ms in the server" in shown
        assert page.run("document.getElementById('shown').naturalWidth") == 640
        (tmp_path / "x").write_bytes(b"bad")
        page.choose(tmp_path / "x")
        until(lambda: page.text("error"))
        assert page.text("error").startswith("image 0: no image")
        assert page.text("answer") == ""
        page.choose(photographs[1])
        until(lambda: "50.0 %" in page.text("answer"))
        assert page.text("error") == ""
        asked = {url for url in page.asked() if not url.startswith("blob:")}
        assert asked <= {f"{server.url}/", f"{server.url}/predict", f"{server.url}/favicon.ico"}
    assert [text for text in page.complaints() if "400" not in text and "404" not in text] == []


def test_the_page_asks_for_the_token_where_there_is_one(page, photographs):
    with running(Played, token="sesame") as server:
        page.open(f"{server.url}/")
        page.choose(photographs[0])
        until(lambda: "token" in page.text("error"))
        assert not page.run("document.getElementById('login').hidden")
        page.run("document.getElementById('token').value = 'sesame'")
        page.choose(photographs[0])
        until(lambda: "50.0 %" in page.text("answer"))


def test_the_other_page_shows_every_route(page):
    with running(Played) as server:
        page.open(f"{server.url}/docs")
        until(lambda: "POST /predict" in page.text("operations"))
        assert "POST /v2/models/{name}/infer" in page.text("operations")
