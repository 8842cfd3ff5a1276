"""Texts that were computed before: a text that begins like one of them starts from its pages."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Items

from tiered.kv_cache import PAGE_SIZE, KVCache, Sequence

Key = tuple[int, ...]  # the tokens of one page
PATIENCE = 1000  # steps


class Node:
    """A full page, after the pages of its ancestors."""

    __slots__ = ("children", "key", "page", "parent", "used")

    def __init__(self, parent: Node | None, key: Key, page: int) -> None:
        self.parent = parent
        self.key = key
        self.page = page
        self.used = 0  # the step when it was last used
        self.children: dict[Key, Node] = {}


class PrefixCache:
    """Keeps full pages of the KV cache after their text has ended; the longest unused go first.

    A tree: texts that begin alike share the pages of their beginning. Not thread-safe: it belongs
    to the thread that owns the KV cache.
    """

    def __init__(self, kv: KVCache) -> None:
        self.kv = kv
        self._root = Node(None, (), -1)
        # Oldest use first. Using a page uses its ancestors after it, so the first is a leaf.
        self._by_use: OrderedDict[Node, None] = OrderedDict()
        self._by_page: dict[int, Node] = {}
        self._steps = 0

    def __len__(self) -> int:
        return len(self._by_use)

    def match(self, tokens: Items[int]) -> list[int]:
        """The pages of the longest beginning of `tokens` that is here; whole pages only."""
        path = self._walk(tokens)
        self._use(path)
        return [node.page for node in path]

    def matched_tokens(self, tokens: Items[int]) -> int:
        """How many tokens `match` would find, without counting as a use."""
        return len(self._walk(tokens)) * PAGE_SIZE

    def insert(self, sequence: Sequence) -> None:
        """Keep the full pages of a text, which may go on or be closed.

        Where the same tokens are here already, the text changes over to these pages. Pages are not
        enough to go on from where a model has recurrent layers: nothing is kept then.
        """
        if self.kv.is_recurrent:
            return
        node, path = self._root, []
        for index, key in enumerate(_keys(sequence.tokens)):
            page = int(sequence.pages[index])
            child = node.children.get(key)
            if child is None:
                self.kv.hold(page)
                child = node.children[key] = self._by_page[page] = Node(node, key, page)
            elif child.page != page:
                self.kv.hold(child.page)
                sequence.pages[index] = child.page
                self.kv.release(page)
            path.append(child)
            node = child
        self._use(path)

    @property
    def num_evictable(self) -> int:
        """Pages that only this cache holds: what evicting everything would free."""
        return sum(not self.kv.is_shared(node.page) for node in self._by_use)

    def evict(self, num_pages: int) -> int:
        """Let go of pages until `num_pages` became free, if there are as many; returns how many.

        A page that a running text holds stays, and so do its ancestors: that text holds them too.
        """
        freed = 0
        for node in list(self._by_use):
            if freed >= num_pages:
                break
            if not self.kv.is_shared(node.page):
                self._remove(node)
                freed += 1
        return freed

    def make_way(self) -> None:
        """A step is over. Where a GPU's experts want the room of the last page, and no text has
        used it for many steps, let go of it, and of what it is the beginning of."""
        self._steps += 1
        while (page := self.kv.last_page) is not None:
            node = self._by_page.get(page)
            if node is None or self.kv.is_shared(page) or node.used + PATIENCE > self._steps:
                return
            self._remove_all(node)

    def clear(self) -> None:
        """Let go of everything."""
        for node in list(self._by_use):
            self._remove(node)

    def _walk(self, tokens: Items[int]) -> list[Node]:
        node, path = self._root, []
        for key in _keys(tokens):
            child = node.children.get(key)
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def _use(self, path: list[Node]) -> None:
        for node in reversed(path):
            self._by_use[node] = None
            self._by_use.move_to_end(node)
            node.used = self._steps

    def _remove_all(self, node: Node) -> None:
        """A node and what goes on from it: pages that were last used no later."""
        for child in list(node.children.values()):
            self._remove_all(child)
        self._remove(node)

    def _remove(self, node: Node) -> None:
        assert not node.children and node.parent is not None
        del node.parent.children[node.key]
        del self._by_use[node], self._by_page[node.page]
        self.kv.release(node.page)


def _keys(tokens: Items[int]) -> list[Key]:
    whole = len(tokens) // PAGE_SIZE * PAGE_SIZE
    return [tuple(tokens[i : i + PAGE_SIZE]) for i in range(0, whole, PAGE_SIZE)]
