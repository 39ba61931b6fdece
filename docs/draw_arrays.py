"""Draw docs/arrays.svg, the picture in the README, from the arrays of a real tree.

python docs/draw_arrays.py [OUT.svg]
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from flatradix import RadixTree

INK, MUTED, LINE, PAPER = "#1f2933", "#6b7785", "#c5ccd4", "#ffffff"
COLOURS = ["#8ecae6", "#ffb703", "#95d5b2", "#f4a6a6", "#cdb4db", "#d8c99b"]
CELL = 0.62
COLUMNS = ("parent", "start", "length", "end", "lock_ref", "tick")


def example() -> RadixTree:
    tree = RadixTree(16, device="cpu")
    keys = [[5, 3, 8, 1, 4], [5, 3, 8, 7, 2, 6], [9, 2]]
    slots = iter(range(20, 60))
    for key in keys:
        tree.insert(key, [next(slots) for _ in key])
    tree.lock(tree.match(keys[1]))
    return tree


def colour(row: int) -> str:
    return COLOURS[(row - 1) % len(COLOURS)]


def cell(axes: Axes, x: float, y: float, text: object, fill: str = PAPER, width: float = CELL) -> None:
    axes.add_patch(Rectangle((x, y), width, CELL, facecolor=fill, edgecolor=LINE, lw=0.8))
    axes.text(x + width / 2, y + CELL / 2 - 0.02, str(text), ha="center", va="center", fontsize=8.5, color=INK)


def label(
    axes: Axes, x: float, y: float, text: str, size: float = 8.5, muted: bool = True, right: bool = False
) -> None:
    axes.text(
        x, y, text, ha="right" if right else "left", va="center", fontsize=size, color=MUTED if muted else INK,
        fontweight="normal" if muted else "bold",
    )  # fmt: skip


def draw_tree(axes: Axes, tree: RadixTree, x: float, y: float) -> None:
    """Draw the logical tree. Each node has the colour of its row."""
    state = tree.content().state
    label(axes, x, y + 1.0, "the tree", 10.5, muted=False)
    label(axes, x + 1.7, y + 1.0, "(black border: locked)")
    places = {0: (x, y - 1.9)}
    axes.add_patch(FancyBboxPatch((x, y - 2.15), 0.9, 0.5, "round,pad=0.04", facecolor="#eef1f4", edgecolor=LINE))
    axes.text(x + 0.45, y - 1.9, "root", ha="center", va="center", fontsize=8.5, color=INK)
    rows = list(range(1, tree.num_nodes + 1))
    order = sorted(rows, key=lambda r: (int(state.parent[r]) >= 0, -int(state.children[r])))
    tops = [r for r in order if int(state.parent[r]) < 0]
    inner = [r for r in order if int(state.parent[r]) >= 0]
    places |= dict(zip(tops, [(x + 1.7, y - 0.6), (x + 1.7, y - 3.3)], strict=False))
    places |= dict(zip(inner, [(x + 4.7, y + 0.2), (x + 4.7, y - 1.5)], strict=False))
    for row in order:
        px, py = places[row]
        begin, length = int(state.start[row]), int(state.length[row])
        text = " ".join(map(str, state.tokens[begin : begin + length].tolist()))
        locked = int(state.lock_ref[row]) > 0
        width = 0.62 + 0.3 * length
        axes.add_patch(
            FancyBboxPatch(
                (px, py - 0.27),
                width,
                0.54,
                "round,pad=0.05",
                facecolor=colour(row),
                edgecolor=INK if locked else LINE,
                lw=1.3 if locked else 0.8,
            )
        )
        axes.text(px + width / 2, py, text, ha="center", va="center", fontsize=9, color=INK)
        above = max(int(state.parent[row]), 0)
        ax_, ay_ = places[above]
        reach = 0.98 if above == 0 else 0.72 + 0.3 * int(state.length[above])
        axes.add_patch(FancyArrowPatch((ax_ + reach, ay_), (px - 0.08, py), arrowstyle="-", color=MUTED, lw=1))


def draw_rows(axes: Axes, tree: RadixTree, x: float, y: float) -> None:
    label(axes, x - 0.75, y + 1.0, "nodes: one array a column, one row a node", 10.5, muted=False)
    state = tree.content().state
    widths = [0.95] * len(COLUMNS)
    for i, name in enumerate(COLUMNS):
        axes.text(
            x + sum(widths[:i]) + widths[i] / 2, y + 0.32, name, ha="center", va="center", fontsize=8, color=MUTED
        )
    rows = list(range(1, tree.num_nodes + 1))
    for i, row in enumerate(rows):
        top = y - CELL * (i + 1)
        axes.text(x - 0.3, top + CELL / 2, f"{row}", ha="center", va="center", fontsize=8.5, color=MUTED)
        for j, name in enumerate(COLUMNS):
            value = int(getattr(state, name)[row])
            text = "ns 0" if name == "parent" and value < 0 else value
            cell(axes, x + sum(widths[:j]), top, text, colour(row), widths[j])


def draw_pools(axes: Axes, tree: RadixTree, x: float, y: float) -> None:
    label(axes, x - 1.05, y + 1.35, "pools: an edge is a range, and a split moves nothing", 10.5, muted=False)
    state = tree.content().state
    slots = tree.content().slots
    used = int(tree.total_tokens) + 3
    owner = {}
    for row in range(1, tree.num_nodes + 1):
        for place in range(int(state.start[row]), int(state.start[row]) + int(state.length[row])):
            owner[place] = row
    for place in range(used):
        axes.text(x + place * CELL + CELL / 2, y + 0.86, place, ha="center", va="center", fontsize=7, color=MUTED)
        row = owner.get(place)
        fill = colour(row) if row else PAPER
        cell(axes, x + place * CELL, y, int(state.tokens[place]) if row else "", fill)
        cell(axes, x + place * CELL, y - CELL, int(slots[place]) if row else "", fill)
    label(axes, x - 0.12, y + CELL / 2, "tokens", right=True)
    label(axes, x - 0.12, y - CELL / 2, "slots", right=True)


def draw_table(axes: Axes, tree: RadixTree, x: float, y: float) -> None:
    label(axes, x, y + 1.35, "child table: hash of (parent, first page)", 10.5, muted=False)
    table = tree.content().state.child_table
    entries = sorted(int(entry) & 0xFFFFFFFF for entry in table[table != 0])
    at = x
    for row in entries:
        cell(axes, at, y, "tag", PAPER, 0.75)
        cell(axes, at + 0.75, y, f"row {row}", colour(row), 0.85)
        at += 1.75
    label(axes, x, y - CELL / 2, "a hit is a guess: the tokens in the pool decide", 8.5)


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "arrays.svg"
    mpl.rcParams["svg.hashsalt"] = "flatradix"
    mpl.rcParams["font.family"] = "DejaVu Sans"
    tree = example()
    figure, axes = plt.subplots(figsize=(10.4, 5.2))
    draw_tree(axes, tree, 0.2, 6.6)
    draw_rows(axes, tree, 9.2, 6.6)
    draw_pools(axes, tree, 1.25, 1.0)
    draw_table(axes, tree, 11.6 - 0.9, 1.0)
    axes.set_xlim(0, 18.0)
    axes.set_ylim(-0.2, 8.1)
    axes.set_aspect("equal")
    axes.axis("off")
    metadata = {"Date": None} if out.suffix == ".svg" else None
    figure.savefig(out, bbox_inches="tight", pad_inches=0.08, metadata=metadata, dpi=110)


if __name__ == "__main__":
    main()
