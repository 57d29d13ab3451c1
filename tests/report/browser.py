"""A real browser for tests: headless Chromium, controlled with the Chrome DevTools Protocol over a pair of pipes."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--remote-debugging-pipe"),
)
ANSWER_WITHIN_S = 60.0


def installed() -> str | None:
    """The path of the browser's command; None if there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One tab of a Chromium with an empty profile. `events`: what the tab has reported, as (method, params)."""

    def __init__(self, profile: Path) -> None:
        command = installed()
        assert command
        to_read, self._to_browser = os.pipe()
        self._from_browser, to_write = os.pipe()
        ours = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_read, to_write)]

        def as_three_and_four() -> None:
            os.dup2(ours[0], 3)
            os.dup2(ours[1], 4)

        self._process = subprocess.Popen(
            [command, *FLAGS, f"--user-data-dir={profile}"],
            preexec_fn=as_three_and_four,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (to_read, to_write, *ours):
            os.close(end)
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._buffer, self._calls, self._tab = b"", 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._tab = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._to_browser)
        os.close(self._from_browser)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": params}
        if self._tab:
            message["sessionId"] = self._tab
        os.write(self._to_browser, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._calls:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        until = time.monotonic() + ANSWER_WITHIN_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from_browser], [], [], max(0, until - time.monotonic()))
            assert ready, f"no answer from the browser within {ANSWER_WITHIN_S:g} s"
            received = os.read(self._from_browser, 1 << 20)
            assert received, "the browser has ended"
            self._buffer += received
        whole, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(whole)
        if "method" in message:
            self.events.append((message["method"], message["params"]))
        return message

    def open(self, page: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Open a file and wait until it is loaded."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media="", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not any(method == "Page.loadEventFired" for method, _ in self.events):
            self._receive()

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression; of a promise, the value it settles to."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def errors(self) -> list[str]:
        """The errors and warnings in the page's console."""
        found = [
            params["exceptionDetails"]["text"] for method, params in self.events if method == "Runtime.exceptionThrown"
        ]
        for method, params in self.events:
            if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert", "warning"):
                found.append(str(params["args"]))
            if method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(params["entry"]["text"])
        return found

    def requested(self) -> list[str]:
        return [params["request"]["url"] for method, params in self.events if method == "Network.requestWillBeSent"]
