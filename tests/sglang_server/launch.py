"""SGLang's own server, on a CPU: python3 -m tests.sglang_server.launch [options of sglang.launch_server]

The HTTP server, tokenizer manager, scheduler, detokenizer and model are SGLang's. Replaced are packages for images,
sound and notebooks, which a server of texts imports and never runs, and `sgl_kernel`, whose functions on a CPU only
speculative decoding calls. The server ends when its standard input does, so it never outlives who started it.
SGLang's processes are spawned: each imports this module first, and so has the replacements too.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

UNUSED = ("IPython", "soundfile", "torchvision")


class _Kernels(types.ModuleType):
    """`sgl_kernel`: each name is a function that raises when called."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*_: Any, **__: Any) -> Any:
            raise NotImplementedError(f"{self.__name__}.{name} is not here: this server is for tests on a CPU")

        return absent


def prepare() -> None:
    """Let this process import SGLang: where its package lies, and what stands in for what is not installed."""
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    import transformers.utils

    from bench.support.sglang_trees import find
    from bench.support.stand_ins import StandIns, missing

    # Before .peers is on the path: ours would hide the package `kernels` that SGLang imports.
    sys.path.insert(0, str(find().parent))
    # transformers remembers whether torchvision is installed: it must look before the stand-in exists.
    transformers.utils.is_torchvision_available()
    StandIns(missing(UNUSED)).install()
    if missing(["sgl_kernel"]):
        sys.modules["sgl_kernel"] = _Kernels("sgl_kernel")
    _take_any_id()


def _take_any_id() -> None:
    """Embed token ids outside the vocabulary as its first or last one: on a CPU they would end the scheduler."""
    import torch

    embedding = torch.nn.functional.embedding
    torch.nn.functional.embedding = lambda ids, weight, *arguments, **options: embedding(
        ids.clamp(0, len(weight) - 1), weight, *arguments, **options
    )


def _end_with_the_input() -> None:
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)


# A spawned process runs this module under the second name.
if __name__ in ("__main__", "__mp_main__"):
    prepare()
if __name__ == "__main__":
    threading.Thread(target=_end_with_the_input, daemon=True).start()
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=False)
