"""The rows' passes through captured steps, on a GPU: told ahead, and collected later."""

from collections import deque
from collections.abc import Sequence
from typing import Any

from ..batch_step import BatchStep, Joining
from .request import Row


class CapturedRunner:
    """A runner (see runner.py) over batch_step.BatchStep."""

    steps_ahead, pads = 2, False

    def __init__(self, model: Any, *, num_pages: int, most_rows: int):
        self.step_of_batch = BatchStep(model, most_rows=most_rows, num_pages=1 + num_pages)
        self._adapters = getattr(model, "row_adapters", None)
        self._rows: list[Row] = []  # by their places
        self._num_pages: list[int] = []  # of each, as the GPU knows them
        self._told: deque[tuple[int, list[Row]]] = deque()  # number of the step, rows
        self._number = 0

    @property
    def num_uncollected(self) -> int:
        """Passes whose tokens are still to be collected."""
        return len(self._told)

    def warm_up(self) -> None:
        """Capture all graphs, so that no request waits for one."""
        self.step_of_batch.warm_up()

    def budget(self, num_running: int) -> tuple[int, int] | None:
        """Rows that it is best to start together, and tokens of theirs; None: any."""
        return self.step_of_batch.budget(num_running)

    def start(self, rows: Sequence[Row]) -> None:
        """Rows join: their prompts, and answers so far, are read up to the last token, now or with
        the next step, which begins with that token."""
        self._forget_those_that_left(rows)
        self.step_of_batch.join(len(self._rows), [self._joining(row) for row in rows])
        self._rows += rows
        self._num_pages += [len(row.pages) for row in rows]

    def step(self, rows: Sequence[Row]) -> None:
        """The next token of each row."""
        self._forget_those_that_left()
        assert set(self._rows) == set(rows)
        self._send_pages()
        self.step_of_batch.step(len(rows), number=self._number)
        self._told.append((self._number, list(self._rows)))
        self._number += 1
        for row in rows:
            row.num_told += 1

    def collect(self) -> list[tuple[Row, int]]:
        """The tokens of the first step that is not collected yet; waits for it."""
        number, rows = self._told.popleft()
        tokens = self.step_of_batch.tokens_of(len(rows), number=number)
        return list(zip(rows, tokens, strict=True))

    def _send_pages(self) -> None:
        """Those that rows have since their last step."""
        for place, row in enumerate(self._rows):
            if len(row.pages) != self._num_pages[place]:
                self.step_of_batch.set_pages(place, _shifted(row.pages))
                self._num_pages[place] = len(row.pages)

    def _forget_those_that_left(self, joining: Sequence[Row] = ()) -> None:
        """A row that left has no pages; the last one takes its place."""
        for place in reversed(range(len(self._rows))):
            if self._rows[place].pages and self._rows[place] not in joining:
                continue
            last = len(self._rows) - 1
            if place == last:
                self.step_of_batch.clear(place)
            else:
                self.step_of_batch.move(last, place)
            self._rows[place], self._num_pages[place] = self._rows[last], self._num_pages[last]
            del self._rows[last], self._num_pages[last]

    def _joining(self, row: Row) -> Joining:
        request = row.request
        adapter = self._adapters.numbers([request.adapter])[0] if self._adapters else 0
        return Joining(
            row.text_ids,
            len(request.prompt),
            _shifted(row.pages),
            request.sampling,
            request.seed,
            adapter,
        )


def _shifted(pages: list[int]) -> list[int]:
    """As the step numbers them, whose first one is scratch."""
    return [1 + page for page in pages]
