"""Random programs with a waiting queue: after every step the queue must say what plain Python finds afresh.

The trees run the whole machine of the trees' tests. So locks, splits, inserts, evictions, resets and files come between
the calls of the queue, and every field of every node is compared, too.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule, run_state_machine_as_test

from flatradix import WaitingQueue
from tests.support.devices import interpreted
from tests.support.forms import poison, poison_results
from tests.support.notes import note
from tests.support.oracle import Namespace, tokens_of
from tests.support.waiting import Plan, Prompt, WaitingOracle
from tests.tree.test_machine import NAMES, SEEDS, START, Held, Machine


def cheap_first(columns: Any) -> Any:
    """A user-defined order, in integers."""
    return columns.length - 2 * columns.cached + columns.shared - 3 * columns.priority


def late_first(columns: Any) -> Any:
    """A user-defined order, in float64. It has many ties."""
    return columns.arrival * 2 - columns.waited


NAMED = ("fcfs", "lpm", "dfs-weight", "hrrn", "shortest-prefill", "aged", "k-lpm")
ORDERS = (*NAMED, cheap_first, late_first)
TIMELESS = ("fcfs", "lpm", "dfs-weight", "shortest-prefill", "k-lpm")
KEYS_HELD = 8
MOST_WAITING = 20


class Matched(NamedTuple):
    """A key and the place where an earlier match of it ended."""

    tokens: list[int]
    namespace: Namespace
    held: Held


class QueueMachine(Machine):
    """The machine of a tree, with a waiting queue on each tree."""

    # These rules do not concern a queue.
    match_bad_token = insert_wrong = write_slots = request = unlock_any = None  # type: ignore[assignment]

    def __init__(self, device: str, page_size: int, bigram: bool) -> None:
        super().__init__(device, page_size, bigram)
        self.wanted: list[Held] = []
        self.matched: list[Matched] = []
        self.now = 0.0
        self.steps_away = 0
        self.steps = 0

    @initialize(keep=st.booleans(), **START)
    def start(self, keep: bool, random: Random, **drawn: Any) -> None:
        super().start(random=random, **drawn)
        self.open_queues(keep, random.random() < 0.3)
        for _ in range(self.rounds(4)):
            self.insert_after_evicting(random)
            self.add(random)

    def rounds(self, most: int) -> int:
        """Return a number of rounds: fewer where each takes a second."""
        return 1 if interpreted(self.device) else most

    def open_queues(self, keep: bool, compute_last: bool) -> None:
        self.keep, self.compute_last = keep, compute_last
        self.waiting = WaitingOracle(self.oracle, keep, compute_last)
        self.queues = [WaitingQueue(side.tree, keep=keep, compute_last=compute_last) for side in self.sides]

    def close_queues(self) -> None:
        self.waiting.close()
        self.queues.clear()
        gc.collect()  # the traceback of a refused call may still hold a queue that keeps

    @rule(keep=st.booleans(), compute_last=st.booleans(), again=st.booleans())
    def reopen(self, keep: bool, compute_last: bool, again: bool) -> None:
        """Delete the queues and open others, often with the same prompts."""
        prompts = self.waiting.prompts
        self.close_queues()
        self.open_queues(keep, compute_last)
        if again:
            self.add_again(prompts)

    def add_again(self, prompts: Sequence[Prompt]) -> None:
        columns = [[getattr(one, name) for one in prompts] for name in ("namespace", "priority", "arrival")]
        queries = [list(one.tokens) for one in prompts]
        self.waiting.add(queries, *columns)
        for queue in self.queues if prompts else ():
            queue.add(queries, *columns)

    # Prompts

    def new_tail(self, random: Random) -> list[int]:
        if self.page_size <= 16:
            return super().new_tail(random)
        blocks = [[1] * (self.page_size - 1) + [random.randint(1, 2)] for _ in range(random.randint(0, 3))]
        return [token for block in blocks for token in block][: 192 - random.choice((0, 0, 1, 63))]

    def make_prompts(self, random: Random) -> tuple[list[list[int]], list[Any]]:
        """Draw prompts that share prefixes with cached keys and with waiting prompts. Return their namespaces, too."""
        prompts = self.make_queries(random, most=5 if len(self.waiting.prompts) < MOST_WAITING else 1)
        names: list[Any] = random.choices(NAMES, k=len(prompts))
        if random.random() < 0.5:
            names = [random.choice(NAMES)] * len(prompts)
        for number in range(len(prompts)):
            kind = random.random()
            if kind < 0.4 and self.oracle.nodes():
                node = random.choice(self.oracle.nodes())
                prompts[number] = self.tokens_of(node.path()) + self.new_tail(random)
                names[number] = node.namespace
            elif kind < 0.7 and self.waiting.prompts:
                other = random.choice(self.waiting.prompts)
                cut = random.choice((len(other.tokens), random.randint(0, len(other.tokens))))
                prompts[number] = [*other.tokens[:cut], *self.new_tail(random)]
                names[number] = random.choice((other.namespace, names[number]))
        note(f"prompts {prompts}")
        return prompts, names

    def tokens_of(self, path: list[Any]) -> list[int]:
        return [path[0][0], *(second for _, second in path)] if self.bigram else path

    @rule(random=SEEDS)
    def add(self, random: Random) -> None:
        prompts, names = self.make_prompts(random)
        priorities = [random.choice((0, 0, 0, -1, 2)) if random.random() < 0.4 else 0 for _ in prompts]
        arrivals = [self.now + random.choice((0, 1, 2.5, -3)) for _ in prompts]
        self.now += random.choice((0, 0.5, 1))
        note(f"namespaces {names}, priorities {priorities}, arrivals {arrivals}")
        forms = self.form(random, prompts)
        columns = [self.one_or_all(random, column) for column in (names, priorities, arrivals)]
        found = self.expect(
            lambda: self.waiting.add(prompts, names, priorities, arrivals),
            lambda side: self.queues[side.number].add(*forms[side.number], *columns),
        )
        assert found is not None
        poison(forms)
        for ids in found[1]:
            self.compare(ids, found[0], torch.int64)

    def one_or_all(self, random: Random, column: list[Any]) -> Any:
        """Return the column, or its only value."""
        same = len(set(map(repr, column))) == 1
        return column[0] if same and random.random() < 0.5 else list(column)

    @rule(random=SEEDS, bad=st.booleans())
    def remove(self, random: Random, bad: bool) -> None:
        waiting = self.waiting.ids()
        ids = random.sample(waiting, min(len(waiting), random.choice((0, 1, 2, 3, 20))))
        if bad and random.random() < 0.3:
            gone = [id for id in range(self.waiting.next_id + 2) if id not in self.waiting.ids()]
            ids.insert(random.randint(0, len(ids)), random.choice(ids + gone))
        note(f"ids {ids}")
        self.remove_ids(random, ids)

    def remove_ids(self, random: Random, ids: list[int]) -> None:
        form: Any = random.choice((list, tuple, lambda ids: torch.tensor(ids, dtype=torch.int64)))
        if len(ids) == 1 and random.random() < 0.5:
            form = int
        self.expect(
            lambda: self.waiting.remove(ids),
            lambda side: self.queues[side.number].remove(form(ids[0] if form is int else ids)),
        )

    # Orders and plans

    @rule(random=SEEDS, policy=st.sampled_from(ORDERS), defer=st.booleans())
    def order(self, random: Random, policy: Any, defer: bool) -> None:
        options: dict[str, Any] = {
            "now": self.now + random.choice((0, 0, 1, 10.5)),
            "patience": random.choice((300.0, 1.0, 7.5)),
            "every": random.randint(1, 5),
            "defer_shared": defer,
        }
        note(f"order {options}")
        expected = self.waiting.order(policy, **options)
        for queue in self.queues:
            self.compare(queue.order(policy, **options), expected, torch.int64)

    def draw_order(self, random: Random) -> tuple[Any, Any]:
        """Draw a policy, or some of the ids in a random order. Return it for the oracle and for a queue."""
        if random.random() < 0.5:
            return (random.choice(TIMELESS),) * 2
        ids = random.sample(self.waiting.ids(), random.randint(0, len(self.waiting.prompts)))
        return ids, torch.tensor(ids, dtype=torch.int64)

    def compare_plans(self, order: tuple[Any, Any], options: dict[str, Any]) -> Plan:
        expected = self.waiting.plan(order[0], **options)
        for queue in self.queues:
            plan = queue.plan(order[1], **options)
            assert plan.new_tokens == expected.new_tokens
            assert type(plan.new_tokens) is int
            self.compare(plan.ids, expected.ids, torch.int64)
            self.compare(plan.cached_lengths, expected.cached_lengths, torch.int32)
        return expected

    @rule(random=SEEDS, serve=st.booleans())
    def plan(self, random: Random, serve: bool) -> None:
        """Plan, and sometimes serve the requests of the plan as an engine does: remove, evict, insert."""
        page = self.page_size
        options = {
            "token_budget": random.choice((None, None, random.randint(0, 20) * page)),
            "max_requests": random.choice((None, None, 0, 1, 3)),
            "free_tokens": random.choice((None, None, 0, random.randint(0, 30) * page)),
            "skip": random.random() < 0.5,
            "reserve": random.choice((0, 0, 1, 5 * page)),
            "share": random.random() < 0.5,
        }
        order = self.draw_order(random)
        note(f"plan {order[0]}, {options}")
        plan = self.compare_plans(order, options)
        if serve and plan.ids:
            prompts = [self.waiting.prompt_of(id) for id in plan.ids]
            self.remove_ids(random, plan.ids)
            for prompt in prompts:
                self.serve(prompt)

    def serve(self, prompt: Prompt) -> None:
        """Insert a prompt, after an eviction of what it lacks."""
        tokens, name = list(prompt.tokens), prompt.namespace
        keys = self.oracle.keys_of([tokens], [name], None)
        self.evict(max(self.oracle.new_units(keys) - (self.oracle.max_tokens - self.oracle.total_tokens), 0))
        slots = self.take([tokens])
        found = self.expect(
            lambda: self.oracle.insert([tokens], slots, [name], [0]),
            lambda side: side.tree.insert([tokens], slots, namespace=name),
        )
        if found is not None:
            self.hold([one.place for one in found[0]], found[1])

    @rule(random=SEEDS)
    def busy(self, random: Random) -> None:
        """Make calls as an engine does, and look at the queues after each."""
        for _ in range(self.rounds(10)):
            kind = random.random()
            if kind < 0.3:
                self.add(random)
            elif kind < 0.55:
                self.insert_after_evicting(random)
            elif kind < 0.7:
                self.order(random, random.choice(ORDERS), random.random() < 0.5)
            elif kind < 0.85:
                self.evict_wanted(random)
            elif kind < 0.9:
                self.want(random)
            else:
                self.plan(random, serve=True)
            self.queues_agree()

    def evict_wanted(self, random: Random) -> None:
        """Mostly evict more than what nobody wants."""
        unlocked = [node for node in self.oracle.nodes() if node.lock_ref == 0]
        wanted = {above for node in self.waiting.nodes_to_give_up() for above in node.upwards()}
        least = tokens_of(node for node in unlocked if node not in wanted and node.wants == 0)
        most = tokens_of(unlocked)
        few = min(least + random.randint(1, 3) * self.page_size, most)
        self.evict(random.randint(*random.choice(((0, most), (least, most), (least, few)))))

    # Wants

    @rule(random=SEEDS)
    def want(self, random: Random) -> None:
        held = self.choose_held(random, random.randint(1, 3))
        operands = [side.places(held) for side in self.sides]
        found = self.expect(
            lambda: self.oracle.want([one.place for one in held]),
            lambda side: side.tree.want(operands[side.number]),
        )
        if found is not None:
            self.wanted += self.hold(found[0], operands)
        poison_results(operands)

    @rule(random=SEEDS, everything=st.booleans())
    def unwant(self, random: Random, everything: bool) -> None:
        count = len(self.wanted) if everything else random.randint(0, len(self.wanted))
        self.unwant_these(random.sample(self.wanted, count))

    @rule(random=SEEDS)
    def unwant_any(self, random: Random) -> None:
        """Take back wants of any places, often with a surplus beside wants: then the call must change nothing."""
        self.unwant_these(self.choose_held(random, random.randint(1, 4), self.wanted + self.held))

    def unwant_these(self, held: list[Held]) -> None:
        found = self.expect(
            lambda: self.oracle.unwant([one.place for one in held]),
            lambda side: side.tree.unwant(side.places(held)),
        )
        for one in held if found is not None else ():
            if one in self.wanted:
                self.wanted.remove(one)

    @rule(random=SEEDS)
    def rematch(self, random: Random) -> None:
        """Match keys again from the places of an earlier match, and other keys for the first time."""
        again = random.sample(self.matched, random.randint(0, len(self.matched)))
        fresh = self.make_queries(random) if random.random() < 0.5 else []
        names: list[Any] = [one.namespace for one in again] + random.choices(NAMES, k=len(fresh))
        keys = [one.tokens for one in again] + fresh
        if not keys:
            return
        starts = [one.held for one in again] + [self.root] * len(fresh)
        forms = self.form(random, keys)
        found = self.expect(
            lambda: self.oracle.rematch(keys, names),
            lambda side: side.tree.rematch(forms[side.number][0], side.places(starts), namespace=names),
        )
        assert found is not None
        poison(forms)
        held = self.hold(*found)
        poison_results(found[1])
        self.matched = [Matched(*one) for one in zip(keys, names, held, strict=True)][-KEYS_HELD:]

    # Evictions without a look at the queue

    @rule(steps=st.integers(1, 5))
    def look_away(self, steps: int) -> None:
        """Do not look at the queues for some steps: they must catch up with several changes at once."""
        self.steps_away = steps

    def roundtrip(self, go_on: bool, slot_device: str | None) -> None:
        """Save and load a tree. What waits and what is wanted is no part of a file."""
        if go_on:
            self.end_wants()
            prompts = self.waiting.prompts
            self.close_queues()
        super().roundtrip(go_on, slot_device)
        if go_on:
            self.open_queues(self.keep, self.compute_last)
            self.add_again(prompts)

    def end_wants(self) -> None:
        for one in list(self.wanted):
            self.unwant_these([one])
        assert not any(node.wants for node in self.oracle.nodes())

    # After each step

    def compare(self, found: torch.Tensor, expected: list[int], dtype: torch.dtype) -> None:
        """Compare a result, then overwrite it: a queue must not keep its memory."""
        assert found.tolist() == expected
        assert found.dtype == dtype
        assert found.device.type == "cpu"
        assert found.dim() == 1
        poison(found)

    @invariant()
    def queues_agree(self) -> None:
        if self.steps_away:
            self.steps_away -= 1
            return
        expected = self.waiting
        for queue in self.queues:
            assert len(queue) == len(expected.prompts)
            self.compare(queue.ids(), expected.ids(), torch.int64)
            for name in ("lengths", "cached_lengths", "shared_lengths"):
                self.compare(getattr(queue, name)(), getattr(expected, name)(), torch.int32)
            assert [id in queue for id in range(expected.next_id + 1)] == [
                id in expected.ids() for id in range(expected.next_id + 1)
            ]

    def check_all(self) -> None:
        for check in (self.sizes_agree, self.trees_agree, self.held_places_agree, self.queues_agree, self.wants_agree):
            check()

    @invariant()
    def plans_agree(self) -> None:
        self.steps += 1
        if not self.steps_away:
            policy = TIMELESS[self.steps % len(TIMELESS)]
            self.compare_plans((policy, policy), {"skip": self.steps % 2 == 0, "share": self.steps % 3 == 0})

    @invariant()
    def wants_agree(self) -> None:
        for node in self.oracle.nodes():
            assert node.wants == node.own_wants + sum(child.wants for child in node.branches.values())
        held = self.held + self.wanted
        alive = self.oracle.alive([one.place for one in held])
        for side in self.sides:
            found = side.tree.alive(side.places(held))
            assert found.tolist() == alive
            assert found.dtype == torch.bool


def named(value: Any) -> str | None:
    return ("bigrams" if value else "tokens") if isinstance(value, bool) else None


@pytest.mark.parametrize(
    ("page_size", "bigram"), [(1, False), pytest.param(2, True, marks=pytest.mark.interpreted), (16, False)], ids=named
)
def test_random_programs(device: str, page_size: int, bigram: bool) -> None:
    """Run all rules of the trees' machine and those of a queue."""
    few = settings(max_examples=1, stateful_step_count=3) if interpreted(device) else settings(max_examples=12)
    run_state_machine_as_test(lambda: QueueMachine(device, page_size, bigram), settings=few)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("page_size", "bigram"),
    [(1, False), (1, True), pytest.param(2, False, marks=pytest.mark.interpreted), (64, True)],
    ids=named,
)
def test_busy_programs(device: str, page_size: int, bigram: bool) -> None:
    """Make an engine's calls alone, many of them, mostly with a queue that keeps."""
    rounds = 1 if interpreted(device) else 10

    @given(st.fixed_dictionaries({**START, "keep": st.sampled_from([True, True, False])}))
    @settings(max_examples=1 if interpreted(device) else 6)
    def run(drawn: dict[str, Any]) -> None:
        machine = QueueMachine(device, page_size, bigram)
        machine.start(**drawn)
        for _ in range(rounds):
            machine.busy(drawn["random"])
            machine.check_all()

    run()
