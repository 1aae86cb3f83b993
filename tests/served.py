"""An engine over a tiny model, and what its rows were told."""

import contextlib
import threading

from chatglm.sampling import Sampling
from chatglm.serving.engine import Engine
from chatglm.serving.metrics import Metrics
from chatglm.serving.request import Request
from chatglm.serving.runner import PlainRunner
from chatglm.serving.scheduler import Scheduler

GREEDY = Sampling(do_sample=False)


class Told:
    """Updates of the rows of one `submit`."""

    def __init__(self, count):
        self.updates = [[] for _ in range(count)]
        self._left, self._over = count, threading.Event()

    def __call__(self, number, update):
        self.updates[number].append(update)
        self._left -= update.is_last
        if not self._left:
            self._over.set()

    def wait(self, seconds=60):
        assert self._over.wait(seconds), "no end"
        return self

    def text(self, number=0):
        return "".join(update.text for update in self.updates[number])

    def last(self, number=0):
        return self.updates[number][-1]


def as_text(tokens):
    """Token ids as text that needs no tokenizer."""
    return "".join(f"{token} " for token in tokens)


@contextlib.contextmanager
def serving(model, *, num_pages=64, most_running=32, most_waiting=10_000, prefill_tokens=512,
            runner=None, decode=as_text):  # fmt: skip
    """A running engine."""
    runner = runner or PlainRunner(model, num_pages=num_pages)
    scheduler = Scheduler(
        num_pages=num_pages,
        page_tokens=64,
        most_running=most_running,
        prefill_tokens=prefill_tokens,
        num_virtual=model.config.pre_seq_len or 0,
    )
    engine = Engine(
        runner,
        scheduler,
        decode=decode,
        eos_token_ids=[model.config.eos_token_id],
        most_waiting=most_waiting,
        metrics=Metrics(num_pages),
    )
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def a_request(model, text, new=8, sampling=GREEDY, **more):
    """A request whose prompt is these ids."""
    config = model.config
    prompt = (*text, config.gmask_token_id, config.bos_token_id)
    return Request(prompt, new, sampling, **more)
