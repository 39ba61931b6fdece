"""Every GPU kernel compiles for every kind of GPU, without a GPU, and programs that must run at once fit together.

Trees whose launches are recorded, but not run, give the variants to compile.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from flatradix import RadixTree, Ragged, WaitingQueue
from flatradix.inputs import devices

pytest.importorskip("triton", reason="Triton is not installed: there is nothing to compile with")
if devices.interpreted():
    pytest.skip("TRITON_INTERPRET=1: an interpreter compiles nothing", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flatradix.device import core
from flatradix.device.mailbox import Mailbox
from flatradix.host import slots_apart
from flatradix.host.slots_apart import Ranges, SlotsApart
from flatradix.kernels import gpu
from flatradix.kernels.gpu.launch import Kernel
from tests.support.inside import arrays_of

SM_80, SM_90, SM_100 = (GPUTarget("cuda", arch, 32) for arch in (80, 90, 100))
GFX942 = GPUTarget("hip", "gfx942", 64)
# Limits of one multiprocessor: registers, bytes of shared memory (of sm_80, the least of all above), warps.
REGISTERS, SHARED, WARPS = 65536, 164 * 1024, 64


# Triton 3.9 warns about a feature that the kernels do not use.
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")


class Variant(NamedTuple):
    """A kernel as a tree launches it. programs: the most on one multiprocessor, reached by a large enough batch."""

    kernel: Kernel
    constants: tuple[int | bool, ...]
    wide: tuple[bool, ...]
    warps: int
    registers: int
    programs: int

    @property
    def name(self) -> str:
        return f"{self.kernel.function.__name__}{self.constants}{'w' if any(self.wide) else ''}"


def types_of(state: tuple[torch.Tensor, ...]) -> Any:
    kinds = {torch.int8: "*i8", torch.int32: "*i32", torch.int64: "*i64"}
    return type(state)(*(kinds[tensor.dtype] for tensor in state))


class Recorder:
    """Makes trees that launch nothing, and records each variant that they would launch once, in order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.variants: dict[Any, Variant] = {}
        self.state: Any = None
        self.scratch: Any = None
        recorder = self

        def launch(
            kernel: Kernel,
            arrays: Any,
            programs: int,
            arguments: Any,
            constants: Any = (),
            wide: Any = (),
            warps: int = 0,
            registers: int = 0,
        ) -> None:
            assert len(arguments) == len(kernel.kinds)
            variant = Variant(kernel, constants, wide, warps or kernel.warps, registers, programs)
            known = recorder.variants.setdefault(variant[:-1], variant)
            recorder.variants[variant[:-1]] = max(known, variant, key=lambda one: one.programs)

        patch.setattr(Kernel, "__call__", launch)
        for module in (core, slots_apart):
            patch.setattr(module, "interpreted", lambda: True)
        patch.setattr(slots_apart, "why_not_cuda", lambda: "")
        patch.setattr(devices, "named", lambda device, asked: torch.device("cuda", 0))
        for name in ("wait", "counter", "refusals"):
            patch.setattr(Mailbox, name, lambda *arguments: 0 if len(arguments) == 1 else 2)

    def tree(self, page_size: int, **options: Any) -> RadixTree:
        tree = RadixTree(100_000, page_size, "cuda", **options)
        arrays = arrays_of(tree)
        self.state, self.scratch = types_of(arrays.state), types_of(arrays.scratch)
        return tree


def batch(keys: int, tokens: int, dtype: torch.dtype = torch.int64) -> Ragged:
    return Ragged(torch.zeros(keys * tokens, dtype=dtype), torch.arange(keys + 1) * tokens)


def use_everything(tree: RadixTree, few: bool) -> None:
    """Call all operations in the forms that engines use most. few: leave out most combinations."""
    many, wide = batch(2000, 20, torch.int32), batch(2000, 20)
    names = [None, "a"] * 1000
    numbers = torch.arange(2000)
    places = SimpleNamespace(handles=torch.zeros(2000, dtype=torch.int64), lengths=torch.zeros(2000, dtype=torch.int32))
    single = torch.zeros(8000, dtype=torch.int32)
    table = torch.zeros((2000, 20), dtype=tree.slot_dtype)
    tree.insert(many, wide, namespace=names, priority=numbers, inserted_lengths=numbers, start=places)
    tree.match(many, namespace=names, start=places, lock=True)
    tree.lock(places)
    tree.unlock(places)
    tree.write_slots(places, table, numbers)
    tree.slots(places)
    tree.compact()
    tree.split(places)
    gpu.rebuild(arrays_of(tree))
    tree.reset()
    tree.evict(1)
    for asked in (1, numbers[:1]):
        tree.evict(asked, out=torch.zeros(200_000, dtype=tree.slot_dtype))
    tree.digest()
    gpu.tell(arrays_of(tree), 1)
    for pinned in (False, True):
        gpu.effective_keys(arrays_of(tree), arrays_of(tree).state.created, pinned)
    for sequence in (single.numpy(), single.long().numpy()):
        for lock in (False, True):
            tree.match(sequence, lock=lock)
        tree.insert(sequence, single)
        tree.insert(np.tile(sequence, 2), torch.cat((single, single)))
    found = tree.match(single.numpy())
    pair = SimpleNamespace(handles=places.handles[:2], lengths=places.lengths[:2])
    for one in (found, pair):
        tree.lock(one)
        tree.unlock(one)
    use_queue(tree, many, places)
    if few:
        return
    for touch, lock in ((True, False), (False, False), (True, True), (False, True)):
        tree.match(single.numpy(), touch=touch, lock=lock)
        tree.match(many, touch=touch, lock=lock)
    for keys in (wide, batch(10, 20), batch(10, 100_000), batch(5000, 20)):
        tree.match(keys)
    tree.match(many, start=places)
    tree.match([single, single], namespace=["a", "b"])
    tree.insert(many, many)
    tree.insert(wide, wide)
    tree.insert(many, wide, start=places)
    tree.write_slots(places, table.long(), numbers)


def use_queue(tree: RadixTree, many: Ragged, places: Any) -> None:
    """Keep for a waiting queue, and pin softly."""
    tree.rematch(many, places)
    tree.alive(places)
    tree.want(places)
    tree.unwant(places)
    queue = WaitingQueue(tree, keep=True)
    queue.add([1, 2, 3, 4])
    queue.cached_lengths()
    tree.evict(1)
    queue.close()


def use_slots_apart(dtype: torch.dtype) -> None:
    """Launch the copy kernel of a separate slot pool, as a tree on the CPU does."""
    slots = SlotsApart(100, dtype, torch.device("cpu"), 0)
    ranges = Ranges(np.array([3, 50], np.int32), np.array([4, 5], np.int32), 9)
    slots.gather(ranges)
    slots.write_ranges(ranges, np.array([0, 4, 9]), torch.zeros((2, 5), dtype=dtype), np.arange(2))


@pytest.fixture(scope="module")
def recorder() -> Iterator[Recorder]:
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(patch)
        use_everything(recorder.tree(1), few=False)
        use_everything(recorder.tree(2, bigram=True, policy="lfu", slot_dtype=torch.int64), few=True)
        for dtype in (torch.int32, torch.int64):
            use_slots_apart(dtype)
    return recorder


def compile_variant(recorder: Recorder, variant: Variant, target: GPUTarget) -> Any:
    function = variant.kernel.function
    names = function.arg_names
    types = [*variant.kernel.types(variant.wide), *["constexpr"] * len(variant.constants)]
    tree = [recorder.state, recorder.scratch] if names[0] == "s" else []
    signature = dict(zip(names, [*tree, *types], strict=True))
    first = len(names) - len(variant.constants)
    constants = {(first + i,): value for i, value in enumerate(variant.constants)}
    options: dict[str, Any] = {"num_warps": variant.warps}
    if target.backend == "cuda":
        options["launch_cooperative_grid"] = variant.kernel.cooperative
        if variant.registers:
            options["maxnreg"] = variant.registers
    return triton.compile(ASTSource(function, signature=signature, constexprs=constants), target, options)


def registers_of(compiled: Any, folder: Path) -> int | None:
    """Return the registers of a thread, or None if this Triton has no cuobjdump."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.is_file():
        return None
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    done = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
    return int(re.findall(r"REG:(\d+)", done.stdout + done.stderr)[-1])


def assert_they_fit(variant: Variant, compiled: Any, folder: Path) -> None:
    """Assert that a multiprocessor can run all programs of a launch on it at once: they wait for one another."""
    programs, shared = variant.programs, compiled.metadata.shared + 1024
    assert programs * variant.warps <= WARPS, f"{variant.name}: {programs} programs of {variant.warps} warps"
    assert programs * shared <= SHARED, f"{variant.name}: {programs} programs with {shared} bytes of shared memory"
    registers = registers_of(compiled, folder)
    if registers is not None:
        most = REGISTERS // (32 * variant.warps * programs) // 8 * 8
        assert registers <= most, f"{variant.name}: {registers} registers, and {programs} programs leave {most}"


def assert_it_acquires(variant: Variant, compiled: Any) -> None:
    """Assert that each wait bypasses the L1 cache by an acquire: Triton 3.6 drops an acquire whose result is unused."""
    released, acquired = (len(re.findall(rf"\.{word}\.", compiled.asm["ptx"])) for word in ("release", "acquire"))
    assert acquired >= released, f"{variant.name}: {released} releases, {acquired} acquires"


def test_the_trees_use_every_kernel(recorder: Recorder) -> None:
    used = {variant.kernel.function.__name__ for variant in recorder.variants.values()}
    assert used == {kernel.function.__name__ for kernel in Kernel.all_kernels}


def test_every_variant(recorder: Recorder, tmp_path: Path) -> None:
    for variant in recorder.variants.values():
        compiled = compile_variant(recorder, variant, SM_90)
        assert_it_acquires(variant, compiled)
        if variant.kernel.cooperative:
            assert_they_fit(variant, compiled, tmp_path)


@pytest.mark.parametrize("target", [SM_80, SM_100, GFX942], ids=lambda target: f"{target.backend}-{target.arch}")
def test_every_kernel(recorder: Recorder, target: GPUTarget, tmp_path: Path) -> None:
    """Compile the first variant of each kernel, which has the most parts."""
    done: set[Kernel] = set()
    for variant in recorder.variants.values():
        if variant.kernel not in done:
            compiled = compile_variant(recorder, variant, target)
            if target.backend == "cuda" and variant.kernel.cooperative:
                assert_they_fit(variant, compiled, tmp_path)
        done.add(variant.kernel)


@pytest.mark.parametrize("kernel", Kernel.all_kernels, ids=lambda kernel: kernel.function.__name__)
def test_a_kernel_is_found_on_disk_by_the_next_process(kernel: Kernel) -> None:
    """Triton hashes the constants of a kernel in the order of (name, address of the module's globals).

    So where two modules give one name two values, the hash differs from process to process, and Triton compiles anew.
    """
    _ = kernel.function.cache_key  # collects the constants
    values: dict[str, set[str]] = {}
    for (name, _module), (value, _globals) in kernel.function.used_global_vals.items():
        if isinstance(value, triton.language.constexpr):
            values.setdefault(name, set()).add(str(value))
    assert [name for name, found in values.items() if len(found) > 1] == []
