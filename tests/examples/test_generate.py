"""The example with a real model: logits with KV from the pool equal those of a forward pass without any cache."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import flatradix
from examples.engine import Engine, Job
from examples.models import config_of, random_model
from examples.paged_kv import require_full_attention
from tests.support.prefix_engine import RememberingCache

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return random_model("tiny", 0, torch.float32, torch.device("cpu"))


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(512, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_plain(model: torch.nn.Module, jobs: list[Job]) -> None:
    """Assert that logits equal those of one forward pass over the whole sequence, and each token is the likeliest."""
    for job in jobs:
        assert job.done
        device = next(model.parameters()).device
        ids = torch.tensor([job.prompt + job.output[:-1]], device=device)
        with torch.inference_mode():
            plain = model(input_ids=ids, use_cache=False).logits[0, len(job.prompt) - 1 :]
        torch.testing.assert_close(torch.stack(job.logits), plain, rtol=1e-4, atol=2e-4)
        assert job.output == plain.argmax(-1).tolist()


def idle(engine: Engine) -> None:
    """Assert that nothing is running and no slot is lost."""
    engine.cache.check()
    counts = engine.cache.counts()
    assert (counts.running, counts.held, counts.protected) == (0, 0, 0)
    assert counts.free + counts.evictable == counts.slots


@pytest.mark.parametrize(("page_size", "chunk"), [(1, 512), (1, 7), (16, 512), (16, 13)])
def test_turns_of_a_conversation(model: torch.nn.Module, page_size: int, chunk: int) -> None:
    system = prompt(50, 1)
    shared = Engine(model, 1024, page_size, max_length=256, chunk=chunk)
    alone = Engine(model, 1024, page_size, max_length=256, chunk=chunk, reuse=False)
    talks = [system, system]
    known = [0, len(system)]  # tokens of each prompt that were computed before
    for turn in range(3):
        prompts = [talk + prompt(11, 10 * turn + at) for at, talk in enumerate(talks)]
        jobs, others = shared.generate(prompts, 6), alone.generate(prompts, 6)
        assert_plain(model, jobs)
        assert_plain(model, others)
        assert [job.output for job in jobs] == [job.output for job in others]
        assert [job.cached for job in jobs] == [length // page_size * page_size for length in known]
        assert [job.cached for job in others] == [0, 0]
        talks = [job.prompt + job.output for job in jobs]
        known = [len(talk) - 1 for talk in talks]  # the last token has no KV
    idle(shared)
    idle(alone)


def test_a_wrong_slot_would_show(model: torch.nn.Module) -> None:
    """Logits depend on each page of cached KV by far more than the tolerance of these tests."""
    engine = Engine(model, 256, max_length=128)
    text = prompt(65, 2)
    (right,) = engine.generate([text], 1)
    for page in range(4):
        (request,) = engine.cache.begin([text])
        assert request.cached_length == 64
        slots = request.slots[16 * page : 16 * page + 16].long()
        engine.cache.abort([request])
        before = engine.kv.values[:, slots].clone()
        engine.kv.values[:, slots] = before.roll(1, dims=1)
        (wrong,) = engine.generate([text], 1)
        assert (right.logits[0] - wrong.logits[0]).abs().max() > 0.02
        engine.kv.values[:, slots] = before


@pytest.mark.parametrize("page_size", [1, 16])
def test_eviction_pressure_and_namespaces(model: torch.nn.Module, page_size: int) -> None:
    engine = Engine(model, 320, page_size, max_requests=3, max_length=160, chunk=32)
    systems = [prompt(48, seed) for seed in range(2)]
    names = [f"tenant {at % 2}" for at in range(6)]
    cached = 0
    for turn in range(4):
        prompts = [systems[(at + turn) // 2 % 2] + prompt(16 + 9 * at, 100 * turn + at) for at in range(6)]
        jobs = engine.generate(prompts, 5, names)
        assert_plain(model, jobs)
        idle(engine)
        cached += sum(job.cached for job in jobs)
    assert engine.cache.counts().evicted_tokens > 320
    assert cached > 0


def test_namespaces_share_nothing(model: torch.nn.Module) -> None:
    engine = Engine(model, 1024, page_size=1, max_length=64)
    text = prompt(40, 3)
    jobs = engine.generate([text] * 4, 2, ["a", "b", "a", None])
    assert [job.cached for job in jobs] == [0, 0, 39, 0]
    assert_plain(model, jobs)
    idle(engine)


def test_decoding_past_the_ends_of_pages(model: torch.nn.Module) -> None:
    """Prompts end before, at and after the end of a page; one batch decodes them over two more pages."""
    engine = Engine(model, 512, page_size=16, max_length=64)
    prompts = [prompt(length, length) for length in (1, 15, 16, 17, 31, 32)]
    jobs = engine.generate(prompts, 32)
    assert_plain(model, jobs)
    idle(engine)
    # A decode step takes one call of the cache: the first token of each prompt comes from its prefill.
    calls = {name: len(seconds) for name, seconds in engine.times.calls.items()}
    assert calls == {"begin": 6, "commit": 6, "step": 31, "extend": 0, "finish": 1}
    assert len(engine.times.steps) == 31
    assert engine.times.steps[:-1] == engine.times.calls["step"][:-1]
    assert engine.times.steps[-1] == engine.times.calls["step"][-1] + engine.times.calls["finish"][0]


def test_output_is_cached_while_its_request_runs(model: torch.nn.Module) -> None:
    """The engine passes each token on when it is generated; whole pages of them are then in the tree."""
    engine = Engine(model, 128, page_size=4, max_length=64)
    seen, committed = [], []

    def look(done: int) -> None:
        if not done:
            (request,) = engine.cache.running
            seen.append(request.tokens.tolist())
            committed.append(request.committed)

    (job,) = engine.generate([prompt(6, 1)], 12, progress=look)
    assert_plain(model, [job])
    assert seen == [job.prompt + job.output[:count] for count in range(11)]  # all but the newest
    assert committed == [4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12]


def test_refused_requests_begin_later(model: torch.nn.Module) -> None:
    engine = Engine(model, 96, page_size=16, max_length=96)
    jobs = engine.generate([prompt(60, 4), prompt(50, 5), prompt(70, 6)], 4)
    assert engine.cache.counts().refused == 2  # once each: the engine retries only when another request has ended
    assert engine.preempted == 0
    assert_plain(model, jobs)
    idle(engine)


@pytest.mark.parametrize("page_size", [1, 16])
def test_preempted_requests_go_on(model: torch.nn.Module, page_size: int) -> None:
    """Three prompts fit, but not with their outputs."""
    engine = Engine(model, 160, page_size, max_length=96)
    jobs = engine.generate([prompt(48, seed) for seed in (7, 8, 9)], 40)
    assert engine.preempted > 0
    assert engine.times.calls["extend"]
    assert_plain(model, jobs)
    idle(engine)
    # The KV that the last job left is found under the right tokens.
    text = jobs[-1].prompt + jobs[-1].output
    (again,) = engine.generate([text], 1)
    assert again.cached == (len(text) - 1) // page_size * page_size
    assert_plain(model, [again])


def test_what_cannot_fit_is_told(model: torch.nn.Module) -> None:
    engine = Engine(model, 64, page_size=16, max_length=128)
    with pytest.raises(RuntimeError, match="a prompt of 70 tokens does not fit: 80 slots are needed and 64 can be had"):
        engine.generate([prompt(70, 1)], 4)
    with pytest.raises(RuntimeError, match="65 tokens of a prompt and its output do not fit"):
        engine.generate([prompt(60, 1), prompt(20, 2)], 10)
    with pytest.raises(ValueError, match="120 and 10 tokens exceed max_length 128"):
        engine.generate([prompt(120, 1)], 10)
    idle(engine)
    assert_plain(model, engine.generate([prompt(30, 1)], 4))


def test_models_without_full_attention_are_refused() -> None:
    config = config_of("tiny")
    require_full_attention(config)
    config.sliding_window, config.use_sliding_window = 32, True
    with pytest.raises(ValueError, match="qwen2 has a sliding window of 32"):
        require_full_attention(config)


def test_index_on_a_gpu(cuda: str) -> None:
    """The model is on the GPU too, or on the CPU if Triton's interpreter replaces the GPU."""
    from flatradix.inputs.devices import interpreted

    model = random_model("tiny", 0, torch.float32, torch.device("cpu" if interpreted() else cuda))
    engine = Engine(model, 80, page_size=16, max_length=64, chunk=32, index=cuda)
    system = prompt(33, 1)
    jobs = engine.generate([system + prompt(5, 2), system + prompt(5, 3), prompt(60, 4)], 2)
    assert [job.cached for job in jobs] == [0, 32, 0]
    assert engine.cache.counts().evicted_tokens > 0
    assert_plain(model, jobs)
    idle(engine)


@pytest.mark.parametrize("num_slots", [64, 1024])
def test_the_loop_of_the_docs(num_slots: int) -> None:
    """The model stores tokens as KV, and computes the next token from the KV of all slots."""
    block = (ROOT / "docs/engine.md").read_text().split("```python\n")[1].split("```")[0]
    prompts = [prompt(20, 1), [*prompt(20, 1)[:18], 1, 2, 3], prompt(5, 2), prompt(70, 3)]
    kv = torch.zeros(num_slots, dtype=torch.int64)

    def next_token(seen: list[int]) -> int:
        return sum(at * token for at, token in enumerate(seen, 1)) % 512

    def model(tokens: list[int], at: int, slots: torch.Tensor) -> int:
        kv[slots[at:].long()] = torch.as_tensor(tokens)
        return next_token(kv[slots.long()].tolist())

    outputs: dict[flatradix.Request, list[int]] = defaultdict(list)
    given = {"namespaces": None, "chunk": 7, "max_tokens": 20, "device": "cpu", "newest": {}, "outputs": outputs}
    home = SimpleNamespace(PrefixCache=RememberingCache)
    names: dict[str, Any] = {"flatradix": home, "num_slots": num_slots, "prompts": prompts, "model": model, **given}
    exec(compile(block, "docs/engine.md", "exec"), names)
    for request, output in outputs.items():
        text = list(names["cache"].prompts[request])
        assert text in prompts
        for token in output:
            assert token == next_token(text)
            text.append(token)
    lengths = [len(output) for output in outputs.values()]
    assert lengths == [20] * 4 if num_slots == 1024 else min(lengths) < max(lengths) == 20
    names["cache"].check()
    assert names["cache"].counts().protected == 0


def test_the_script(tmp_path: Path) -> None:
    work = ["--size", "tiny", "--system", "40", "--message", "10", "--new", "3", "--turns", "2", "--conversations", "2"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/generate.py"), *work],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    turns = [line.split() for line in done.stdout.splitlines() if line.strip()[:1] in ("1", "2")]
    assert [turn[:4] for turn in turns] == [["1", "2", "100", "32"], ["2", "2", "126", "96"]]
    assert all("6 of 6" in " ".join(turn) for turn in turns)
    times = done.stdout.partition("host time in calls of the cache, with reuse\n")[2].splitlines()
    assert times[0].split() == ["calls", "median", "us", "total", "us"]
    found = [(line[:12].strip(), *line[12:].split()) for line in times[1:]]
    assert [row[:2] for row in found] == [
        ("begin", "4"),
        ("commit", "4"),
        ("step", "4"),
        ("finish", "2"),
        ("decode step", "4"),
    ]
    assert all(float(middle) <= float(total) for _, _, middle, total in found)
