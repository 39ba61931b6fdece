"""Generate with a transformers model whose KV is paged, and shared between requests by a flatradix PrefixCache.

Several conversations begin with the same system prompt and go on for some turns. The prompt of each turn is the whole
conversation so far. It is answered twice: with the KV that earlier requests left in the cache, and without any reuse.
The report compares outputs, logits, and the median time to first token. That time runs from the begin of a request, so
waiting for other requests does not count. The last lines say how much host time the calls of the cache took.
Prompts are random tokens, and without --model the weights are random too: nothing is downloaded.
Needs transformers: pip install -c constraints.txt transformers

  python examples/generate.py                             a small model on the CPU, in less than a minute
  python examples/generate.py --device cuda               0.5B parameters on a GPU, long prompts
  python examples/generate.py --slots 1000                a pool too small for all: eviction, requests that wait
  python examples/generate.py --tenants 2 --page-size 1   conversations of two tenants, who share nothing
  python examples/generate.py --model FOLDER              a checkpoint on disk
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # flatradix need not be installed

if TYPE_CHECKING:
    import torch

    from examples.engine import CallTimes, Engine, Job

# By device. A GPU gets longer prompts, as a short prefill there costs little more than its launches.
DEFAULTS = {
    "cpu": {"size": "small", "system": 512, "message": 48, "new": 12, "chunk": 128},
    "cuda": {"size": "0.5b", "system": 8192, "message": 512, "new": 32, "chunk": 1024},
}
# The largest difference of logits that rounding explains.
TOLERANCE = {"float32": 1e-3, "bfloat16": 1.0}
DTYPE = "float32 (the default), or bfloat16, where rounding may exchange two tokens that are nearly as likely"
TIMES = "{:<12} {:>8} {:>12} {:>12}"
LINE = "{:>4} {:>8} {:>8} {:>8} {:>12} {:>12} {:>7} {:>14} {:>13}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    model = parser.add_argument_group("model")
    model.add_argument("--size", choices=["tiny", "small", "0.5b", "1.5b"], help="random weights (small; cuda: 0.5b)")
    model.add_argument("--model", metavar="FOLDER", help="a checkpoint instead, as save_pretrained writes it")
    model.add_argument("--device", default="cpu", help="of the model and its KV: cpu (the default), cuda, cuda:N")
    model.add_argument("--dtype", choices=list(TOLERANCE), default="float32", help=DTYPE)
    cache = parser.add_argument_group("cache")
    cache.add_argument("--slots", type=positive, help="KV slots of the pool (default: enough for all conversations)")
    cache.add_argument("--page-size", type=positive, default=16, help="slots a page (default: %(default)s)")
    cache.add_argument("--chunk", type=positive, help="tokens a forward of a prefill (default: 128; cuda: 1024)")
    cache.add_argument("--index", default="cpu", help="the device of the prefix cache's index (default: %(default)s)")
    work = parser.add_argument_group("workload")
    work.add_argument("--conversations", type=positive, default=4, help="at once (default: %(default)s)")
    work.add_argument("--turns", type=positive, default=4, help="(default: %(default)s)")
    work.add_argument("--system", type=positive, help="tokens of the system prompt (default: 512; cuda: 8192)")
    work.add_argument("--message", type=positive, help="tokens of each message (default: 48; cuda: 512)")
    work.add_argument("--new", type=positive, help="tokens generated for each message (default: 12; cuda: 32)")
    work.add_argument("--tenants", type=positive, default=1, help="namespaces for conversations (default: %(default)s)")
    work.add_argument("--seed", type=int, default=0, help="of weights and prompts (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    for name, value in DEFAULTS["cpu" if chosen.device == "cpu" else "cuda"].items():
        if getattr(chosen, name) is None:
            setattr(chosen, name, value)
    return chosen


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number from 1 on")
    return int(text)


def tokens_of(chosen: argparse.Namespace) -> int:
    """Return the number of tokens of a conversation after its last turn."""
    return chosen.system + chosen.turns * (chosen.message + chosen.new)


def load(chosen: argparse.Namespace) -> torch.nn.Module:
    import torch

    from examples import models

    try:
        device = torch.device(chosen.device)
    except RuntimeError:
        raise ValueError(f"--device {chosen.device} is no device: give cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {chosen.device}: torch sees no CUDA device here")
    dtype = getattr(torch, chosen.dtype)
    if chosen.model:
        return models.model_from(chosen.model, dtype, device)
    return models.random_model(chosen.size, chosen.seed, dtype, device)


def engines_for(chosen: argparse.Namespace, model: torch.nn.Module) -> tuple[Engine, Engine]:
    """Return an engine that reuses KV, and an engine that does not, both warmed up."""
    import flatradix
    from examples.engine import Engine

    length = tokens_of(chosen)
    pages = -(-length // chosen.page_size)
    slots = chosen.slots or chosen.conversations * pages * chosen.page_size
    sizes = (slots, chosen.page_size, chosen.conversations, length, chosen.chunk, chosen.index)
    with_reuse, without = Engine(model, *sizes), Engine(model, *sizes, reuse=False)
    longest = random_tokens(1, length - chosen.new, model.config.vocab_size, chosen.seed)
    show_progress("warming up")
    flatradix.warm_up(chosen.index, chosen.page_size, slot_device=chosen.device)
    for engine in (with_reuse, without):  # the first calls compile kernels, and allocate
        engine.generate(longest, min(chosen.new, 2))
        engine.cache.reset()
        engine.times.clear()
    return with_reuse, without


def random_tokens(rows: int, count: int, vocabulary: int, seed: int) -> list[list[int]]:
    import torch

    return torch.randint(vocabulary, (rows, count), generator=torch.Generator().manual_seed(seed)).tolist()


def show_progress(text: str) -> None:
    """Show a text on the line below the report, if stderr is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="\r", file=sys.stderr, flush=True)


def run(chosen: argparse.Namespace, with_reuse: Engine, without: Engine) -> float:
    """Run all turns and print a line for each. Return the largest difference of logits."""
    vocabulary = with_reuse.model.config.vocab_size
    (system,) = random_tokens(1, chosen.system, vocabulary, chosen.seed + 1)
    talks = [list(system) for _ in range(chosen.conversations)]
    names = [f"tenant {talk % chosen.tenants}" for talk in range(chosen.conversations)]
    worst = 0.0
    for turn in range(1, chosen.turns + 1):
        messages = random_tokens(chosen.conversations, chosen.message, vocabulary, chosen.seed + 1 + turn)
        prompts = [talk + message for talk, message in zip(talks, messages, strict=True)]
        answers = []
        for engine, how in ((with_reuse, "with reuse"), (without, "without reuse")):
            where = f"turn {turn} of {chosen.turns}, {how}"
            answers.append(
                engine.generate(
                    prompts, chosen.new, names, lambda done, where=where: show_progress(f"{where}: {done} answers")
                )
            )
        worst = max(worst, report_turn(turn, *answers))
        talks = [prompt + job.output for prompt, job in zip(prompts, answers[0], strict=True)]
    return worst


def report_turn(turn: int, shared: list[Job], alone: list[Job]) -> float:
    """Print the line of a turn. Return the largest difference of logits."""
    equal, outputs, difference = compare(shared, alone)
    with_reuse, without = (median(job.first_token for job in jobs) for jobs in (shared, alone))
    show_progress("")
    print(
        LINE.format(
            turn,
            len(shared),
            sum(len(job.prompt) for job in shared),
            sum(job.cached for job in shared),
            f"{with_reuse * 1e3:.1f} ms",
            f"{without * 1e3:.1f} ms",
            f"{without / with_reuse:.1f} x",
            f"{equal} of {outputs}",
            f"{difference:.1e}",
        ),
        flush=True,
    )
    return difference


def compare(shared: list[Job], alone: list[Job]) -> tuple[int, int, float]:
    """Compare two runs of the same prompts.

    Return the number of equal output tokens, the number of output tokens, and the largest difference of logits. After
    the first token that differs, the two runs continue different texts, so the rest of that output is not compared.
    """
    equal, difference = 0, 0.0
    for one, other in zip(shared, alone, strict=True):
        for a, b, x, y in zip(one.output, other.output, one.logits, other.logits, strict=True):
            difference = max(difference, float((x - y).abs().max()))
            if a != b:
                break
            equal += 1
    return equal, sum(len(job.output) for job in shared), difference


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    try:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        show_progress("making the model")
        model = load(chosen)
        with_reuse, without = engines_for(chosen, model)
        report_setting(chosen, with_reuse)
        worst = run(chosen, with_reuse, without)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        show_progress("")
        print(f"generate.py: {error}", file=sys.stderr)
        if isinstance(error, ModuleNotFoundError):
            print(f"install it: pip install {error.name}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        show_progress("")
        return 130
    report_counts(with_reuse)
    report_times(with_reuse.times)
    allowed = TOLERANCE[chosen.dtype]
    if worst > allowed:
        print(f"WRONG: logits differ by {worst:.1e}; rounding explains {allowed:.0e} at most in {chosen.dtype}")
        return 1
    return 0


def report_setting(chosen: argparse.Namespace, engine: Engine) -> None:
    import torch

    from examples.models import num_parameters

    where = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "cpu"
    counts = engine.cache.counts()
    show_progress("")
    print(
        f"model     {chosen.model or chosen.size}: {num_parameters(engine.model) / 1e6:.1f}M parameters, "
        f"{chosen.dtype}, on {where}\n"
        f"KV pool   {counts.slots} slots in pages of {chosen.page_size}, {engine.kv.nbytes / 2**20:.1f} MiB; "
        f"index on {engine.cache.tree.device}\n"
        f"workload  {chosen.conversations} conversations, {chosen.tenants} tenant{'s' * (chosen.tenants > 1)}; tokens: "
        f"system prompt {chosen.system}, message {chosen.message}, answer {chosen.new}\n"
    )
    print(LINE.format("", "", "prompt", "cached", "first token", "first token", "", "equal", "largest diff."))
    print(
        LINE.format("turn", "requests", "tokens", "tokens", "with reuse", "without", "faster", "outputs", "of logits")
    )


def report_counts(engine: Engine) -> None:
    counts = engine.cache.counts()
    print(
        f"\nwith reuse, {counts.hit_rate:.0%} of all prompt tokens were cached; {counts.evicted_tokens} were evicted, "
        f"{engine.preempted} requests preempted, {counts.refused} begins refused"
    )


def report_times(times: CallTimes) -> None:
    """Print the host time of the cache's calls: begin and commit of prefills, and what decode steps need."""
    print("\nhost time in calls of the cache, with reuse\n" + TIMES.format("", "calls", "median us", "total us"))
    for name, seconds in (*times.calls.items(), ("decode step", times.steps)):
        if seconds:
            print(TIMES.format(name, len(seconds), f"{median(seconds) * 1e6:.1f}", f"{sum(seconds) * 1e6:.0f}"))


if __name__ == "__main__":
    sys.exit(main())
