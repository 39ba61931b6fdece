"""SGLang servers as processes: two of one configuration, side by side, that differ in their prefix cache."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import httpx

from bench.support.sglang_trees import PeerMissing, find
from tests.sglang_server.events import Listener

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = ("default", "flatradix")
SECONDS_TO_START = 400
# requirements/server.txt and what of requirements/peers.txt is needed first.
_NEEDED = (
    "aiohttp", "einops", "fastapi", "jsonschema", "msgspec", "openai", "setproctitle", "transformers", "uvicorn",
    "uvloop", "xgrammar", "zmq",
)  # fmt: skip
_ALWAYS = (
    "--device=cpu", "--dtype=float32", "--attention-backend=torch_native", "--sampling-backend=pytorch",
    "--disable-cuda-graph", "--grammar-backend=none", "--enable-cache-report", "--mem-fraction-static=0.5",
    "--random-seed=1", "--sleep-on-idle",
)  # fmt: skip
# One thread a process, and nothing that a compiler makes at the first request.
_QUICK = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
_TROUBLES = re.compile(
    r"leak|double free|use-after-free|hit an exception|AssertionError|Segmentation|Failed to load plugin|StaleHandle"
)


class Settings(NamedTuple):
    """How both servers are started: SGLang's options, variables of the environment, and whether KV events are read."""

    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = {}
    events: bool = False


class ServerFault(RuntimeError):
    """A server did not start, or ended. The message shows the end of its log."""


def why_not() -> str:
    """Return why a server cannot run here, or an empty string."""
    if sys.version_info < (3, 11):
        return "SGLang needs Python 3.11 or later"
    try:
        find()
    except PeerMissing as error:
        return str(error)
    absent = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (pip install -r requirements/peers.txt -r requirements/server.txt)"
    return ""


class Launcher:
    """A process that has imported SGLang and starts servers. It and its servers end at the end of a `with` block."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "launcher.log"
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.sglang_server.launch"],
                cwd=ROOT,
                env={**os.environ, **_QUICK, **(environment or {})},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        try:
            self._read("ready")
        except BaseException:
            self.close()
            raise

    def launch(self, options: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
        """Start a server; return its process id, which is that of its process group."""
        order = {"options": list(options), "environment": dict(environment), "log": str(log)}
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise ServerFault(f"the process that imports SGLang has ended ({error}):\n{end_of(self._log)}") from None
        return int(self._read(""))

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def _read(self, expected: str) -> str:
        """Return the next line that is expected or, without an expectation, a number. SGLang may print others.

        Raises ServerFault.
        """
        late = threading.Timer(SECONDS_TO_START, self._process.kill)
        late.start()
        try:
            for line in self._process.stdout:
                if line.strip() == expected or (not expected and line.strip().isdigit()):
                    return line
        finally:
            late.cancel()
        raise ServerFault(
            f"the process that imports SGLang has ended, or took more than {SECONDS_TO_START} s. {end_of(self._log)}"
        )

    def close(self) -> None:
        """End the process; its servers end within a second."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Server:
    """One server, with its log in FOLDER/BACKEND.log."""

    def __init__(self, launcher: Launcher, backend: str, model: Path, folder: Path, settings: Settings) -> None:
        port, torch_port, events_port = free_ports(3)
        self.backend = backend
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / f"{backend}.log"
        self.listener = Listener(events_port) if settings.events else None
        options = [*_ALWAYS, *settings.options, f"--model-path={model}", "--host=127.0.0.1", f"--port={port}"]
        options.append(f"--nccl-port={torch_port}")
        if backend != "default":
            options.append(f"--radix-cache-backend={backend}")
        if settings.events:
            config = {"publisher": "zmq", "endpoint": f"tcp://*:{events_port}", "topic": "kv"}
            options.append(f"--kv-events-config={json.dumps(config)}")
        self.began = time.monotonic()
        self._group = launcher.launch(options, settings.environment, self.log)

    def wait_until_up(self, seconds: float = SECONDS_TO_START) -> float:
        """Wait until the server has answered its first request; return how long it took. Raises ServerFault."""
        while time.monotonic() < self.began + seconds:
            if not self.lives:
                raise ServerFault(self._say("ended at its start"))
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(self.url + "/health", timeout=5).status_code == 200:
                    return time.monotonic() - self.began
            time.sleep(0.2)
        raise ServerFault(self._say(f"was not up after {seconds:.0f} s"))

    def post(self, path: str, data: object = None) -> httpx.Response:
        return httpx.post(self.url + path, json=data, timeout=120)

    @property
    def lives(self) -> bool:
        return self._signal(0)

    @property
    def is_healthy(self) -> bool:
        """Whether the server lives and generates a token."""
        if not self.lives:
            return False
        try:
            return httpx.get(self.url + "/health_generate", timeout=60).status_code == 200
        except httpx.HTTPError:
            return False

    def troubles(self) -> list[str]:
        """Return the lines of the log that tell of a leak, a failed check or an exception."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line[:300] for line in lines if _TROUBLES.search(line)]

    def stop(self) -> None:
        """End the server and all its processes. May be called at any time, and again."""
        if self.listener is not None:
            self.listener.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._group, signal.SIGTERM)  # only the first process: it ends the others
        if not self._has_ended(seconds=8):
            self._signal(signal.SIGKILL)
            self._has_ended(seconds=10)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _has_ended(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.lives and time.monotonic() < deadline:
            time.sleep(0.05)
        return not self.lives

    def _signal(self, number: int) -> bool:
        """Send a signal to the processes of the server; return whether there was one."""
        try:
            os.killpg(self._group, number)
        except ProcessLookupError:
            return False
        return True

    def _say(self, what: str) -> str:
        return f"the server with the {self.backend} prefix cache {what}. {end_of(self.log)}"


def end_of(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-30:]
    return f"The end of {log}:\n" + "\n".join(line[:1000] for line in lines)


def free_ports(count: int) -> list[int]:
    """Return ports that nobody uses, below those that the system gives to clients."""
    with contextlib.ExitStack() as taken:
        found: list[int] = []
        while len(found) < count:
            port = random.SystemRandom().randrange(15_000, 32_000)
            with contextlib.suppress(OSError):
                taken.enter_context(socket.socket()).bind(("", port))
                found.append(port)
        return found


@contextlib.contextmanager
def running(launcher: Launcher, model: Path, folder: Path, settings: Settings) -> Iterator[list[Server]]:
    """Run a server for each backend in a `with` block. Raises ServerFault."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Server(launcher, backend, model, folder, settings)) for backend in BACKENDS]
        for server in servers:
            server.wait_until_up()
        yield servers
