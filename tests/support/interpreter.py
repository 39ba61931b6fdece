"""Triton's interpreter, made faster for tests."""

from __future__ import annotations

from typing import Any


def patch_once_a_launch() -> None:
    """Have a launch patch `triton.language` once.

    The interpreter looks at every name of the language again at each call of a device function, which takes half the
    time of our tests. Does nothing where this Triton has it otherwise.
    """
    import triton
    from triton.runtime import interpreter

    original = getattr(interpreter, "_patch_lang", None)
    if original is None:
        return
    patched: set[tuple[int, ...]] = set()  # by the launch that runs: sets of modules
    modules_of: dict[Any, tuple[int, ...]] = {}

    def patch(function: Any) -> Any:
        modules = modules_of.get(function)
        if modules is None:
            values = {id(value) for value in function.__globals__.values()}
            modules = tuple(id(module) for module in (triton.language, triton.language.core) if id(module) in values)
            modules_of[function] = modules
        if modules in patched:
            return None
        scope = original(function)
        if not patched:
            restore = scope.restore

            def restore_all() -> None:
                patched.clear()
                restore()

            scope.restore = restore_all
        patched.add(modules)
        return scope

    interpreter._patch_lang = patch
