"""Runs commands as documents give them, on free ports of this machine and with paths of a test."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from autoflip_flwr.launch import superlink

ROOT = Path(__file__).resolve().parent.parent
APP = ("autoflip_flwr", "client_app.py", "configs", "docker", "LICENSE", "pyproject.toml", "README.md", "server_app.py")
LIMIT = 420.0  # seconds for one command


class Replay:
    """A folder with a copy of the app, a Flower home, and the processes that were started in it.

    `said` maps what the documents say to what it is here; the keys are regular expressions.
    """

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder, self.home = folder / "app", home
        self.said: dict[str, str] = {}
        self.environment = superlink._environment(home) | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        self.started: list[subprocess.Popen[bytes]] = []
        for name in APP:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            copy(ROOT / name, self.folder / name)
        for port in ("18000", "18094", "18095", "18096"):
            self.said[rf"\b{port}\b"] = str(superlink._free_port())

    def here(self, text: str) -> str:
        for pattern, replacement in self.said.items():
            text = re.sub(pattern, replacement, text)
        return text

    def connect(self, toml: str) -> None:
        with (self.home / "config.toml").open("a", encoding="utf-8") as file:
            file.write(self.here(toml))

    def line(self, line: str) -> None:
        """One line of a document's shell: servers stay, all else must succeed."""
        words = shlex.split(self.here(line), comments=True)
        if not words:
            return
        if words[0] == "unset":
            for name in words[1:]:
                self.environment.pop(name, None)
        elif words[0] == "export":
            self.environment |= dict(word.split("=", 1) for word in words[1:])
        elif words[0].startswith("flower-"):
            self.start(words)
        else:
            code, output = self.call(words)
            assert code == 0, output

    def call(self, words: list[str], cwd: Path | None = None) -> tuple[int, str]:
        done = subprocess.run(
            self._found(words),
            cwd=cwd or self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        return done.returncode, done.stdout

    def start(
        self, words: list[str], cwd: Path | None = None, environment: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        with self.log(len(self.started)).open("wb") as out:
            process = subprocess.Popen(
                self._found(words),
                cwd=cwd or self.folder,
                env=environment or self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.started.append(process)
        if words[0] == "flower-superlink":
            port = re.search(r"--port[ =](\d+)", " ".join(words))[1]
            insecure = "--insecure" in words
            self.wait(lambda: self._answers(f"http{'' if insecure else 's'}://127.0.0.1:{port}/health"))
        return process

    def wait(self, done) -> None:
        limit = time.monotonic() + superlink.START_LIMIT
        while not done():
            assert self.started[-1].poll() is None, self.tail()
            assert time.monotonic() < limit, self.tail()
            time.sleep(0.2)

    def log(self, number: int) -> Path:
        return self.home / f"{number}.log"

    def tail(self) -> str:
        return "\n".join(self.log(number).read_text(errors="replace")[-3000:] for number in range(len(self.started)))

    def _found(self, words: list[str]) -> list[str]:
        tool = superlink.TOOLS / words[0]
        return [str(tool), *words[1:]] if "/" not in words[0] and tool.exists() else words

    def _answers(self, url: str) -> bool:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        handlers = urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        try:
            with urllib.request.build_opener(*handlers).open(url, timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False


@contextmanager
def replaying(folder: Path) -> Iterator[Replay]:
    """In the block commands can be run; at its end all that they have started is stopped."""
    with superlink._stage(keep_logs=False) as home:
        replay = Replay(folder, home)
        try:
            yield replay
        finally:
            if os.environ.get("AUTOFLIP_TEST_LOGS"):
                print(replay.tail())
    for process in replay.started:  # reaped by others
        process.poll()


def write_data(folder: Path, part: int, parts: int, examples: int = 48) -> Path:
    """Digits in the size of MNIST as four `.npy` files; each part has images of its own."""
    folder.mkdir(parents=True)
    bunch = load_digits()
    small = (bunch.images[part::parts] * 15.9).astype(np.uint8)
    images = np.pad(small.repeat(3, axis=1).repeat(3, axis=2), ((0, 0), (2, 2), (2, 2)))
    labels = bunch.target[part::parts].astype(np.int64)
    arrays = {
        "x_train": images[:examples],
        "y_train": labels[:examples],
        "x_test": images[-examples:],
        "y_test": labels[-examples:],
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder
