"""Drawing of a small tree as text: one line per node."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from flatradix.inputs.namespaces import Key, key_of, name_of
from flatradix.inspect.content import Content
from flatradix.inspect.nodes import NodeView, nodes_of

LEGEND = (
    "start+length [first tokens]; locks: that hold the node, own: of these, the ones that end at it; tick: last use"
)
_FIRST_TOKENS = 4


def draw(content: Content, max_nodes: int = 60, details: bool = False) -> str:
    """Return the tree as lines: each namespace below a line of its own, siblings in the order of their creation.

    max_nodes: if the tree has more nodes, only the nodes nearest to the root are drawn, and lines say how many are left
    out. details: also draw ticks of creation, hit counts and priorities. Raises ValueError unless max_nodes is
    positive.
    """
    if max_nodes < 1:
        raise ValueError(f"max_nodes {max_nodes}: it must be 1 or more")
    forest = _Forest(nodes_of(content))
    shown = {node.row for node in islice(forest.breadth_first(), max_nodes)}
    lines = [_headline(content)]
    for key, tops in forest.tops.items():
        namespace = name_of(key)
        lines.append("no namespace" if namespace is None else f"namespace {namespace!r}")
        lines.extend(_lines(forest, tops, shown, details))
    return "\n".join(lines)


class _Entry(NamedTuple):
    """The subject of one line: a node, or `hidden` nodes that are left out."""

    node: NodeView | None
    hidden: int
    is_last: bool


class _Forest:
    """The nodes of a tree, grouped by parent."""

    def __init__(self, nodes: list[NodeView]) -> None:
        self.tops: dict[Key, list[NodeView]] = {}
        self._below: dict[int, list[NodeView]] = {}
        self._sizes: dict[int, int] = {}
        for node in sorted(nodes, key=lambda node: (repr(node.namespace), node.created, node.row)):
            siblings = self.tops.setdefault(key_of(node.namespace), []) if node.parent < 0 else self.below(node.parent)
            siblings.append(node)
        for node in reversed(nodes):  # children before their parents
            self._sizes[node.row] = 1 + sum(self._sizes[child.row] for child in self.below(node.row))

    def below(self, row: int) -> list[NodeView]:
        return self._below.setdefault(row, [])

    def breadth_first(self) -> Iterator[NodeView]:
        """Yield all nodes, those nearest to the root first."""
        level = [node for tops in self.tops.values() for node in tops]
        while level:
            yield from level
            level = [child for node in level for child in self.below(node.row)]

    def entries(self, siblings: list[NodeView], shown: set[int]) -> list[_Entry]:
        """Return the siblings that are shown, then one entry for all other siblings and the nodes below them."""
        visible = [node for node in siblings if node.row in shown]
        hidden = sum(self._sizes[node.row] for node in siblings if node.row not in shown)
        entries = [_Entry(node, 0, node is visible[-1] and not hidden) for node in visible]
        return [*entries, _Entry(None, hidden, True)] if hidden else entries


def _lines(forest: _Forest, tops: list[NodeView], shown: set[int], details: bool) -> Iterator[str]:
    """Yield the lines of siblings and all nodes below them. Not recursive: a path may be thousands of nodes deep."""
    stack = [("", entry) for entry in reversed(forest.entries(tops, shown))]
    while stack:
        indent, entry = stack.pop()
        branch = "└── " if entry.is_last else "├── "
        if entry.node is None:
            yield f"{indent}{branch}… {entry.hidden:,} more"
            continue
        yield f"{indent}{branch}{_describe(entry.node, details)}"
        indent += "    " if entry.is_last else "│   "
        stack.extend((indent, child) for child in reversed(forest.entries(forest.below(entry.node.row), shown)))


def _headline(content: Content) -> str:
    options = content.options
    nodes = f"{content.nodes:,} node" + ("" if content.nodes == 1 else "s")
    most = "" if options.grows else f" of {options.max_tokens:,}"
    return (
        f"{content.evictable + content.protected:,}{most} tokens in {nodes}, "
        f"{content.protected:,} locked; page size {options.page_size}, policy "
        f"{'a function' if callable(options.policy) else options.policy}"
    )


def _describe(node: NodeView, details: bool) -> str:
    tokens = node.path[node.start : node.start + _FIRST_TOKENS]
    more = " …" if node.length > len(tokens) else ""
    text = f"{node.start}+{node.length} [{' '.join(_token(token) for token in tokens)}{more}]"
    if node.lock_ref:
        text += f"  locks {node.lock_ref}" + (f" (own {node.own_locks})" if node.own_locks else "")
    text += f"  tick {node.tick}" + "  dropped" * node.dropped
    if details:
        text += f"  created {node.created}  hits {node.hit_count}  priority {node.priority}"
    return text


def _token(token: int | tuple[int, int]) -> str:
    return f"({token[0]},{token[1]})" if isinstance(token, tuple) else str(token)
