"""A watchdog that names the rank that is lost.

torch.distributed waits 30 minutes for a rank that is gone, then raises without naming it. Hence the
watchdog: every rank writes a heartbeat into the store where the ranks have met, and reads all
others', in a thread, since the main thread is stuck in a collective then. It has a connection of
its own to that store: the process group's is locked for as long as the main thread waits on it,
and a second store would need a second open port.
"""

import itertools
import json
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any, ClassVar, NoReturn

import torch.distributed as dist

from .cluster import address_towards
from .errors import ToolkitError

FINISHED, INTERRUPTED = "finished", "interrupted"


class Watchdog:
    """Ends this process when another rank is lost, with one line a machine, which names the rank.

    A process that died is noticed at once by the ranks of its machine, and through them by all
    within a beat; a machine or a link that is gone, after timeout_seconds; a rank that never joins,
    after start_timeout_seconds. Silence is counted in beats of this process, not by the clock, so
    that a machine that slept does not accuse the others when it wakes.
    """

    meetings: ClassVar[Iterator[int]] = itertools.count()

    def __init__(
        self,
        rank: int,
        world_size: int,
        *,
        address: str,
        port: int,
        timeout_seconds: float = 30.0,
        start_timeout_seconds: float = 600.0,
        advice: str = "",
    ):
        """address, port: where the ranks meet (MASTER_ADDR, MASTER_PORT). advice: ends the line.

        The ranks may meet several times; each makes as many watchdogs as the others.
        """
        self.meeting = next(self.meetings)
        self.rank, self.address, self.port, self.advice = rank, address, port, advice
        self.timeout_seconds, self.start_timeout_seconds = timeout_seconds, start_timeout_seconds
        self.beat_seconds = min(1.0, timeout_seconds / 5)
        self.beat, self.end = 0, ""  # end: "", FINISHED, INTERRUPTED, or the line of the error
        self.store: dist.Store | None = None
        self.states: dict[int, dict[str, Any]] = {}  # what each rank that joined last wrote
        self.silence = dict.fromkeys(range(world_size), 0.0)  # seconds since a rank last wrote
        self.processes: dict[int, int] = {}  # file descriptor of a process of this machine -> rank
        self.poll = select.poll()
        self.thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Watch from now on. Before torch.distributed starts, who never joins is named too."""
        self.thread.start()

    def stop(self) -> None:
        """Say goodbye: this rank has finished or was interrupted; the others are told."""
        self._leave(FINISHED, self.timeout_seconds)

    def on_exception(self, error: BaseException) -> None:
        """To be called with the error that ends this rank, before anything else is done about it.

        If a lost rank caused it (gloo raises as soon as a peer dies), the process ends in here,
        with the line, once it is known which one. Of any other failure the ranks left are told.
        After Ctrl-C or SIGTERM the ranks wait in here for rank 0, which may be saving: when a
        process of its machine ends early, Lightning kills it.
        """
        if not isinstance(error, Exception):
            self._leave(INTERRUPTED, self.start_timeout_seconds if self.rank else 0)
            return
        if isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error):
            self._wait(self.timeout_seconds + 5 * self.beat_seconds)
        if isinstance(error, ToolkitError):
            speaks = self._speaks()
            self._leave(f"{self._names([self.rank])} failed: {error}", 5 * self.beat_seconds)
            if not (speaks and self._speaks()):
                time.sleep(3 * self.beat_seconds)  # till the rank that does has read it
                os._exit(2)
            return
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        self._leave(self._line([self.rank], f"failed ({reason})"), 5 * self.beat_seconds)

    def _leave(self, end: str, patience_seconds: float) -> None:
        self.end = self.end or end
        self._wait(patience_seconds)

    def _wait(self, seconds: float) -> None:
        if self.thread.is_alive():
            self.thread.join(seconds)

    def _run(self) -> None:
        try:
            self.store = self._join()
            threading.Thread(target=self._watch_store, name="watchdog", daemon=True).start()
            died: list[int] = []
            while not self.end:
                self._exchange()
                line = self._verdict(died)
                if line and not self.end:
                    self._conclude(line)
                died = self._wait_a_beat()
            self._exchange()
            while self._has_to_wait():
                self._wait_a_beat()
                self._exchange()
        except RuntimeError as error:
            self._on_store_error(error)

    def _join(self) -> dist.Store:
        is_host = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if not is_host:
            self._wait_for_host()
        store = dist.TCPStore(
            self.address,
            self.port,
            is_master=is_host,
            multi_tenant=True,  # init_process_group finds the port open and shares it
            wait_for_workers=False,
            timeout=timedelta(seconds=2 * self.timeout_seconds),  # _watch_store is quicker
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"watchdog/{attempt}/{self.meeting}", store)

    def _wait_for_host(self) -> None:
        """TCPStore can wait for its host itself, but prints stack traces when none comes."""
        deadline = time.monotonic() + self.start_timeout_seconds
        while time.monotonic() < deadline:
            with suppress(OSError):
                socket.create_connection((self.address, self.port), self.beat_seconds).close()
                return
            time.sleep(self.beat_seconds)
        self._conclude(self._not_joined([0]))

    def _has_to_wait(self) -> bool:
        """True for rank 0, in which the store lives, till the others leave; see on_exception.

        After an interrupt the ranks of its own machine leave when it does.
        """
        if self.rank:
            return self.end == INTERRUPTED
        staying = [rank for rank in self.silence if not self.states.get(rank, {}).get("end")]
        return any(self.end != INTERRUPTED or self._is_elsewhere(rank) for rank in staying)

    def _wait_a_beat(self) -> list[int]:
        """The ranks of this machine whose process ended; the first one to end ends the wait."""
        ended = [descriptor for descriptor, _ in self.poll.poll(1000 * self.beat_seconds)]
        for descriptor in ended:
            self.poll.unregister(descriptor)
            os.close(descriptor)
        return [self.processes.pop(descriptor) for descriptor in ended]

    def _exchange(self) -> None:
        """Write the own state, read the others'."""
        assert self.store is not None
        self.beat += not self.end  # a rank that leaves is silent
        self._write()
        joined = [r for r in self.silence if r in self.states or self.store.check([str(r)])]
        texts = self.store.multi_get([str(rank) for rank in joined])
        states = {rank: json.loads(text) for rank, text in zip(joined, texts, strict=True)}
        for rank in self.silence:
            is_silent = states.get(rank) == self.states.get(rank)
            self.silence[rank] = self.silence[rank] + self.beat_seconds if is_silent else 0.0
        for rank in states.keys() - self.states.keys():
            self._watch_process(rank, states[rank])
        self.states = states

    def _write(self) -> None:
        assert self.store is not None
        state = {
            "beat": self.beat,
            "end": self.end,
            "host": address_towards(self.address),
            "machine": _machine(),
            "pid": os.getpid(),
        }
        self.store.set(str(self.rank), json.dumps(state))

    def _watch_process(self, rank: int, state: dict[str, Any]) -> None:
        if rank == self.rank or state["machine"] != _machine():
            return
        with suppress(OSError):  # it has ended already: its silence will tell
            descriptor = os.pidfd_open(state["pid"])
            self.processes[descriptor] = rank
            self.poll.register(descriptor, select.POLLIN)

    def _verdict(self, died: Iterable[int]) -> str | None:
        """The line to end with, if a rank is lost, or if another rank has ended with one."""
        ends = {rank: state["end"] for rank, state in self.states.items()}
        for end in ends.values():
            if end not in ("", FINISHED, INTERRUPTED):
                return end
        dead = [rank for rank in died if not ends[rank]]
        if dead:
            return self._line(dead, "died")
        absent = [rank for rank in self.silence if rank not in ends]
        if any(self.silence[rank] >= self.start_timeout_seconds for rank in absent):
            return self._not_joined(absent)
        interrupted = [rank for rank in ends if ends[rank] == INTERRUPTED]
        if any(self.silence[rank] >= self._patience(rank) for rank in interrupted):
            return self._line(interrupted, "been interrupted")
        silent = [rank for rank in ends if not ends[rank] and self._is_silent(rank)]
        if any(self.silence[rank] >= self.timeout_seconds for rank in silent):
            return self._not_answered(silent)
        return None

    def _patience(self, rank: int) -> float:
        """Seconds to wait for an interrupted rank; rank 0 may be saving, then ends its machine's.

        Ctrl-C reaches the ranks of one machine, those of others have to end by themselves.
        """
        if self._is_elsewhere(rank):
            return 5 * self.beat_seconds
        return self.timeout_seconds if rank else self.start_timeout_seconds

    def _is_elsewhere(self, rank: int) -> bool:
        return self.states.get(rank, {}).get("machine") != _machine()

    def _speaks(self) -> bool:
        """True for one rank of this machine, whose ranks share a terminal: the lowest not lost."""
        return not any(self._can_speak(rank) for rank in self.states if rank < self.rank)

    def _can_speak(self, rank: int) -> bool:
        state = self.states[rank]
        if state["machine"] != _machine() or state["end"] in (FINISHED, INTERRUPTED):
            return False
        is_running = rank in self.processes.values() and not self._is_silent(rank)
        return is_running or bool(state["end"])

    def _is_silent(self, rank: int) -> bool:
        """The ranks of a machine that is lost fall silent within a beat or two of each other."""
        return self.silence[rank] > self.timeout_seconds - 2 * self.beat_seconds

    def _watch_store(self) -> None:
        """The store's machine can vanish without a word: a call to it then never returns."""
        silence, beat = 0.0, self.beat
        while self.thread.is_alive() and not self.end:
            time.sleep(self.beat_seconds)
            silence = silence + self.beat_seconds if beat == self.beat else 0.0
            beat = self.beat
            if silence >= self.timeout_seconds:
                self.store, self.silence[0] = None, silence
                self._conclude(self._not_answered([0]))

    def _on_store_error(self, error: RuntimeError) -> None:
        if self.store is None:
            self._conclude(
                f"the ranks cannot meet at {self.address}:{self.port}; stopped. Choose another"
                f" MASTER_PORT ({str(error).splitlines()[0]})"
            )
        self.store, self.silence[0] = None, self.timeout_seconds
        end = self.states.get(0, {}).get("end")
        if not self.end and end != FINISHED:
            self._conclude(self._line([0], "been interrupted" if end == INTERRUPTED else "died"))

    def _conclude(self, line: str) -> NoReturn:
        """Print the line, pass it on where the store can be reached, end the process."""
        if self._speaks():
            print(f"\nerror: {line}", file=sys.stderr, flush=True)  # \n: below a progress bar
        if self.store is not None:
            self.end = line
            with suppress(RuntimeError):
                self._write()
            if self.rank == 0:
                time.sleep(2 * self.beat_seconds)  # the store ends with this process
        os._exit(1)  # the main thread may be stuck in a collective for good

    def _line(self, ranks: Iterable[int], what: str) -> str:
        return f"{self._names(ranks)} {what}; stopped. {self.advice}".rstrip()

    def _not_answered(self, ranks: Iterable[int]) -> str:
        return self._line(ranks, f"not answered for {self.timeout_seconds:g} s")

    def _not_joined(self, ranks: Iterable[int]) -> str:
        return (
            f"{self._names(ranks)} not joined at {self.address}:{self.port} within"
            f" {self.start_timeout_seconds:g} s; stopped. Start all machines with the same"
            " MASTER_ADDR, MASTER_PORT and WORLD_SIZE, within that time"
        )

    def _names(self, ranks: Iterable[int]) -> str:
        """'rank 3 (host 10.0.0.2) has', 'ranks 2, 3 (host 10.0.0.2) have'."""
        by_host: dict[str, list[str]] = {}
        for rank in sorted(ranks):
            own = {"host": address_towards(self.address)} if rank == self.rank else {}
            state = self.states.get(rank, own)
            host = f" (host {state['host']})" if state else ""
            by_host.setdefault(host, []).append(str(rank))
        count = sum(map(len, by_host.values()))
        names = " and ".join(", ".join(group) + host for host, group in by_host.items())
        return f"rank {names} has" if count == 1 else f"ranks {names} have"


def _machine() -> str:
    """This machine or container: where process ids mean the same."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip() + os.readlink("/proc/self/ns/pid")
