"""SGLang's own servers, on a CPU, from one process: python3 -m tests.sglang_server.launch

It imports SGLang, prints "ready" and reads orders: a line of JSON with `options` (of sglang.launch_server),
`environment` and `log` (a path). For each it forks a server, which leads a process group of its own, and prints its
process id. The servers end when this process does, and this process ends with its standard input: so servers never
outlive who started them.

HTTP server, tokenizer manager, scheduler, detokenizer and model are SGLang's. What differs from its command line:

- Packages for images, sound and notebooks, which a server of texts imports and never runs, are replaced by stand-ins,
  and so is `sgl_kernel`, whose functions on a CPU only speculative decoding calls.
- The processes of a server are forked, not spawned. Spawned, each would import SGLang anew: half a minute of two cores.
- Token ids outside the vocabulary are embedded as its first or last one. On a CPU they would end the scheduler.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import runpy
import signal
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any

MODEL = "llama"
UNUSED = ("IPython", "soundfile", "torchvision")
# What the processes of a server import. flatradix is not among them: its plug-in is loaded by each server.
PRELOADED = (
    "sglang.launch_server", "sglang.srt.entrypoints.http_server", "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager", f"sglang.srt.models.{MODEL}",
    "sglang.srt.layers.attention.torch_native_backend", "numba",
)  # fmt: skip


class _Kernels(types.ModuleType):
    """`sgl_kernel`: each name is a function that raises when called."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*_: Any, **__: Any) -> Any:
            raise NotImplementedError(f"{self.__name__}.{name} is not here: this server is for tests on a CPU")

        return absent


def prepare() -> None:
    """Import SGLang, with stand-ins for what is not installed."""
    import transformers.utils

    from bench.support.sglang_trees import find
    from bench.support.stand_ins import StandIns, missing

    # In front of this folder, whose `kernels` would hide the package that SGLang imports.
    folder = find()
    sys.path.insert(0, str(folder.parent))
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    others = [path.stem for path in (folder / "srt" / "models").glob("*.py") if path.stem != MODEL]
    os.environ["SGLANG_DISABLED_MODEL_ARCHS"] = ",".join(others)  # it would import them all
    # transformers remembers whether torchvision is installed: it must look before the stand-in exists.
    transformers.utils.is_torchvision_available()
    StandIns(missing(UNUSED)).install()
    if missing(["sgl_kernel"]):
        sys.modules["sgl_kernel"] = _Kernels("sgl_kernel")
    _take_any_id()
    for name in PRELOADED:
        importlib.import_module(name)


def _take_any_id() -> None:
    import torch

    embedding = torch.nn.functional.embedding
    torch.nn.functional.embedding = lambda ids, weight, *arguments, **options: embedding(
        ids.clamp(0, len(weight) - 1), weight, *arguments, **options
    )


def obey() -> None:
    """Fork a server for each order, until the input ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # an ended server leaves nothing behind
    print("ready", flush=True)
    for line in sys.stdin:
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            _serve(parent, **json.loads(line))
        print(child, flush=True)
    os._exit(0)  # at once: the servers wait for it


def _serve(parent: int, options: list[str], environment: dict[str, str], log: str) -> None:
    """Be a server, and never return."""
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with open(os.devnull, "rb") as nothing, open(log, "wb") as out:
            for target, source in ((0, nothing), (1, out), (2, out)):
                os.dup2(source.fileno(), target)
        os.environ.update(environment)
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        multiprocessing.set_start_method("fork")
        multiprocessing.set_start_method = lambda *_, **__: None  # SGLang asks for "spawn"
        sys.argv = ["sglang.launch_server", *options]
        runpy.run_module("sglang.launch_server", run_name="__main__")
        status = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if status:
            sys.excepthook(*sys.exc_info())
        os._exit(status)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    prepare()
    obey()
