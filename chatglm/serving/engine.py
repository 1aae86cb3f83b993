"""The loop that serves: rows join, take a step together, and leave, in a thread of its own.

Everything that touches the model happens in this thread; others hand it rows and cancellations,
and are told updates. An error in a row's prompt ends that row, an error in a step those that took
it; the others go on.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

from ..growing_text import GrowingText
from .metrics import Metrics
from .request import Request, Row, Update
from .runner import Runner
from .scheduler import Scheduler

logger = logging.getLogger("chatglm")

STOP_SECONDS = 10.0
"""For a pass that runs when all is to end; a first one may be capturing graphs."""
MOST_FAILED_STEPS = 3
"""In a row; then the card, or the model on it, is taken for broken."""


class EngineBusy(Exception):
    """The queue is full. retry_after_seconds: when there may be room again."""

    def __init__(self, retry_after_seconds: float):
        super().__init__(f"too many requests wait; try again in {retry_after_seconds:.0f} s")
        self.retry_after_seconds = retry_after_seconds


class EngineStopped(Exception):
    """It ends, or its model is broken."""


class Engine:
    """Answers of a model to any number of requests."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        *,
        decode: Callable[[list[int]], str],
        eos_token_ids: Sequence[int],
        most_waiting: int,
        metrics: Metrics,
    ):
        """decode: text of token ids. most_waiting: rows in the queue, beyond which it is busy."""
        self.runner, self.scheduler, self.metrics = runner, scheduler, metrics
        self.most_waiting = most_waiting
        self.failure: str | None = None
        """Why nothing more is served, once the model is taken for broken."""
        self._decode, self._ends = decode, frozenset(eos_token_ids)
        self._inbox: queue.SimpleQueue[tuple[str, Row | None]] = queue.SimpleQueue()
        self._rows: set[Row] = set()  # that are not over
        self._num_waiting = 0  # those in the inbox too
        self._has_ended = False  # nobody looks into the inbox any more
        self._lock = threading.Lock()  # of the two above
        self._stopping = threading.Event()
        self._failed_steps = 0
        self._seconds_a_row = 1.0  # a running mean, for Retry-After
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Serve from now on."""
        self._thread.start()

    def stop(self, grace_seconds: float = 0.0) -> None:
        """Take no more requests, let those that are there end within the time, then end."""
        self._stopping.set()
        self._inbox.put(("wake", None))
        self._thread.join(grace_seconds)
        self._inbox.put(("quit", None))
        self._thread.join(STOP_SECONDS)

    @property
    def is_alive(self) -> bool:
        """False once it has stopped or failed."""
        return self._thread.is_alive() and self.failure is None

    def submit(self, requests: Sequence[Request], deliver: Callable[[int, Update], None]) -> list:
        """Hand in requests that belong together; gives their rows, to cancel them by.

        deliver(number, update) is called in the engine's thread.

        Raises:
            EngineBusy, EngineStopped: and none of them is taken.
        """
        if self._stopping.is_set() or not self.is_alive:
            raise EngineStopped(self.failure or "the server is stopping")
        rows = [
            Row(
                request,
                deliver=lambda update, number=number: deliver(number, update),  # type: ignore[misc]
                answer=GrowingText(self._decode, request.stops),
            )
            for number, request in enumerate(requests)
        ]
        with self._lock:
            if self._has_ended:
                raise EngineStopped(self.failure or "the server is stopping")
            places = max(self.scheduler.most_running - len(self.scheduler.running), 0)
            if self._num_waiting + len(rows) > self.most_waiting + places:
                raise EngineBusy(self._wait_estimate(self._num_waiting))
            self._num_waiting += len(rows)
            for row in rows:
                self._inbox.put(("add", row))
        return rows

    def cancel(self, rows: Sequence[Row]) -> None:
        """Their client is gone: they leave before the next step. May come after their end."""
        for row in rows:
            self._inbox.put(("cancel", row))

    def _wait_estimate(self, waiting: int) -> float:
        places = self.scheduler.most_running
        return min(max(waiting / places * self._seconds_a_row, 1.0), 60.0)

    def _run(self) -> None:
        try:
            self.runner.warm_up()
            while self._take_in():
                self._drop_overdue()
                self._advance()
                self._show_load()
        except Exception as error:  # nobody else can say it
            logger.exception("the engine failed")
            self._fail_all(f"{type(error).__name__}: {error}")
        self._end_all("the server is stopping")

    def _take_in(self) -> bool:
        """What came in since; waits when there is nothing to do. False: the end."""
        while True:
            idle = not (self._rows or self.runner.num_uncollected)
            if idle:
                self._show_load()
                if self._stopping.is_set() and self._inbox.empty():
                    return False
            try:
                word, row = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            if word == "quit":
                return False
            if row is not None and word == "add":
                self._rows.add(row)
                self.scheduler.add(row)
            elif row is not None:
                self._end(row, None)

    def _drop_overdue(self) -> None:
        now = time.monotonic()
        for row in [row for row in self._rows if now > row.request.deadline]:
            self._end(row, Update(error="the deadline of the request has passed", error_status=504))

    def _advance(self) -> None:
        """The prompts of rows that join, and a step of all."""
        scheduler, runner = self.scheduler, self.runner
        self._leave_the_told()
        budget = runner.budget(len(scheduler.running))
        joining = scheduler.admit(budget)  # each row that runs has a page left for its next token
        if joining:
            self._join(joining)
            self._leave_the_told()
        leaving = scheduler.rows_without_room()
        if leaving:
            self._collect(0)  # what was told of their answers is not to be told again
            leaving = scheduler.rows_without_room()
            scheduler.put_back(leaving)
            self.metrics.put_back(len(leaving))
        if scheduler.running:
            scheduler.make_room()
            self._step()
        self._collect(runner.steps_ahead if scheduler.running else 0)

    def _join(self, rows: list[Row]) -> None:
        """Read the prompts of rows that join."""
        new = [row for row in rows if not row.is_accepted]
        self._accept(new)
        self._start(rows)
        self.metrics.read_prompts(
            sum(len(row.request.prompt) for row in new if row.request.is_counted)
        )
        self._collect(self.runner.steps_ahead)

    def _accept(self, rows: Sequence[Row]) -> None:
        """They wait no more; those that come back were counted before."""
        for row in rows:
            row.is_accepted = True
        with self._lock:
            self._num_waiting -= len(rows)

    def _start(self, rows: list[Row]) -> None:
        try:
            self.runner.start(rows)
        except Exception as error:  # whichever row it was
            if len(rows) > 1:
                for row in rows:
                    self._start([row])
            else:
                logger.exception("a prompt of %d tokens failed", len(rows[0].request.prompt))
                self._end(rows[0], Update(error=f"{type(error).__name__}: {error}"))

    def _step(self) -> None:
        try:
            self.runner.step(self.scheduler.running)
            self._failed_steps = 0
        except Exception as error:  # those of this step fail; the next may go on
            logger.exception("a step of %d rows failed", len(self.scheduler.running))
            self._failed_steps += 1
            for row in list(self.scheduler.running):
                self._end(row, Update(error=f"{type(error).__name__}: {error}"))
            if self._failed_steps >= MOST_FAILED_STEPS:
                raise

    def _leave_the_told(self) -> None:
        """Rows that were told all their tokens take no further step."""
        for row in [row for row in self.scheduler.running if not row.wants_more]:
            self.scheduler.remove(row)

    def _collect(self, most_left: int) -> None:
        while self.runner.num_uncollected > most_left:
            for row, token in self.runner.collect():
                if not row.is_over:
                    self._take(row, token)

    def _take(self, row: Row, token: int) -> None:
        """A token of a row: its text goes out, and the row leaves if it is the last one."""
        now = time.monotonic()
        is_first = row.last_token_at is None
        if row.request.is_counted:
            since = row.arrived if row.last_token_at is None else row.last_token_at
            self.metrics.token(now - since, is_first=is_first)
        row.last_token_at = now
        row.tokens.append(token)
        is_end = token in self._ends
        text = row.answer.add(token) if not is_end else ""
        at_limit = len(row.tokens) >= row.request.max_new_tokens
        if not (is_end or at_limit or row.answer.is_stopped):
            self._deliver(row, Update(text, len(row.tokens)))
            return
        text += row.answer.finish()
        is_whole = is_end or row.answer.is_stopped
        self._end(row, Update(text, len(row.tokens), "stop" if is_whole else "length"))

    def _end(self, row: Row, last: Update | None) -> None:
        """The row leaves. last: what its client is told, None if it is gone."""
        if row.is_over:
            return
        row.is_over = True
        self._rows.discard(row)
        if not row.is_accepted:
            self._accept([row])
        self.scheduler.remove(row)
        seconds = time.monotonic() - row.arrived
        if last is not None and last.finish_reason:
            self._seconds_a_row += 0.1 * (seconds - self._seconds_a_row)
        if row.request.is_counted:
            end = "cancelled" if last is None else last.finish_reason or "error"
            self.metrics.ended(end, seconds)
        if last is not None:
            self._deliver(row, last)

    def _deliver(self, row: Row, update: Update) -> None:
        try:
            row.deliver(update)
        except Exception:  # its client's loop is gone, say: no harm to the others
            logger.exception("an update could not be delivered")

    def _show_load(self) -> None:
        scheduler = self.scheduler
        used = scheduler.pool.num_pages - scheduler.pool.num_free
        self.metrics.load(len(scheduler.running), len(scheduler.waiting), used)

    def _fail_all(self, reason: str) -> None:
        self.failure = reason
        self._end_all(reason)

    def _end_all(self, reason: str) -> None:
        with self._lock:
            self._has_ended = True
        while not self._inbox.empty():
            word, row = self._inbox.get()
            if word == "add" and row is not None:
                self._rows.add(row)
        for row in list(self._rows):
            self._end(row, Update(error=reason, error_status=503))
        self._show_load()
