"""Simulating LLM servers on a trace: how much each scheduling policy finds in the prefix cache, and who waits how long.

`run.simulate` is the entry. `serve` moves the clock of one server. `server` is a server with a flatradix tree and
queue, `sglang` one with SGLang's scheduler and cache. `belady` counts the hits of an eviction that knows the future.
"""
