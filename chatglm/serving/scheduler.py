"""Whose turn it is: first come, first served, within a fixed number of cache pages.

Rows join in the order of their arrival as soon as there is a place for them, and never overtake one
another, so none starves. When the pages run out, the row that came last goes back to the head of
the queue; it has its tokens, and its prompt and they are read again when it comes back. The oldest
row always goes on, so there is always progress.
"""

from collections import deque
from collections.abc import Iterable

from .request import Row


class PagePool:
    """The numbers of the pages that no row has."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Pages to be had."""
        return len(self._free)

    def take(self, number: int) -> list[int]:
        """So many pages; the caller has looked that they are there."""
        assert number <= len(self._free)
        return [self._free.pop() for _ in range(number)]

    def give_back(self, pages: list[int]) -> None:
        """Pages that `take` gave; the list is emptied."""
        self._free += reversed(pages)
        pages.clear()


class Scheduler:
    """Rows that wait and rows that run, and their pages of page_tokens tokens each.

    num_virtual: tokens of a prefix that stand before each row's own. prefill_tokens: of the prompts
    that are read together, though one alone may be longer; with the pads of the shorter ones, if
    the runner `pads`.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_tokens: int,
        most_running: int,
        prefill_tokens: int,
        num_virtual: int = 0,
        pads: bool = True,
    ):
        self.pool = PagePool(num_pages)
        self.page_tokens, self.num_virtual = page_tokens, num_virtual
        self.most_running, self.prefill_tokens = most_running, prefill_tokens
        self.pads = pads
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []  # in the order of their arrival

    @property
    def most_tokens(self) -> int:
        """Of a prompt and its answer together: what a row has room for when it is alone."""
        return self.pool.num_pages * self.page_tokens - self.num_virtual

    def add(self, row: Row) -> None:
        """A row that has just arrived."""
        self.waiting.append(row)

    def remove(self, row: Row) -> None:
        """A row that ended, wherever it is; its pages are free at once."""
        if row in self.running:
            self.running.remove(row)
        elif row in self.waiting:
            self.waiting.remove(row)
        self.pool.give_back(row.pages)

    def admit(self, budget: tuple[int, int] | None = None) -> list[Row]:
        """The rows that join now, with pages for their prompts and a token.

        A page for each row that runs is left, or those just admitted would go back at once. budget:
        rows, and tokens of theirs, below prefill_tokens.
        """
        joining: list[Row] = []
        most_rows, most_tokens = budget or (self.most_running, self.prefill_tokens)
        most_tokens = min(most_tokens, self.prefill_tokens)
        longest = total = 0
        while self.waiting and len(self.running) < self.most_running:
            row = self.waiting[0]
            length = len(row.request.prompt) + len(row.tokens)
            needed = self._pages_for(length + 1)
            longest, total = max(longest, length), total + length
            read = longest * (1 + len(joining)) if self.pads else total
            if needed + len(self.running) > self.pool.num_free:
                break
            if joining and (read > most_tokens or len(joining) == most_rows):
                break
            self.waiting.popleft()
            row.pages = self.pool.take(needed)
            self.running.append(row)
            joining.append(row)
        return joining

    def rows_without_room(self) -> list[Row]:
        """Those that have to go back so that each of the others has a page for its next token."""
        free, leaving = self.pool.num_free, list[Row]()
        staying = list(self.running)
        while sum(map(self._lacks_page, staying)) > free:
            youngest = staying.pop()
            free += len(youngest.pages)
            leaving.append(youngest)
        return leaving

    def put_back(self, rows: Iterable[Row]) -> None:
        """To the head of the queue, the one that came last first; what was told and not known of
        their answers is forgotten."""
        for row in rows:
            self.running.remove(row)
            self.pool.give_back(row.pages)
            row.num_told = len(row.tokens)
            self.waiting.appendleft(row)

    def make_room(self) -> None:
        """A page for the next token of every row that runs."""
        for row in self.running:
            if self._lacks_page(row):
                row.pages += self.pool.take(1)

    def _lacks_page(self, row: Row) -> bool:
        return self._pages_for(row.num_cached + 1) > len(row.pages)

    def _pages_for(self, length: int) -> int:
        return -(-(self.num_virtual + length) // self.page_tokens)
