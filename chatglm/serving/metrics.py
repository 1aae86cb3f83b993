"""What Prometheus reads at /metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

LATENCIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
TOKEN_SECONDS = (0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1)
REQUEST_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)


class Metrics:
    """Counters of one server. Rates, such as tokens a second, are Prometheus's to take:
    rate(chatglm_generated_tokens_total[1m])."""

    def __init__(self, num_pages: int):
        self.registry = registry = CollectorRegistry()
        self._running = Gauge("chatglm_requests_running", "Rows in the batch.", registry=registry)
        self._waiting = Gauge("chatglm_requests_waiting", "Rows in the queue.", registry=registry)
        self._pages = Gauge("chatglm_cache_pages_used", "Pages of keys and values in use.",
                            registry=registry)  # fmt: skip
        Gauge("chatglm_cache_pages", "Pages of keys and values.", registry=registry).set(num_pages)
        self._generated = Counter("chatglm_generated_tokens", "Tokens of answers.",
                                  registry=registry)  # fmt: skip
        self._read = Counter("chatglm_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._put_back = Counter("chatglm_rows_put_back", "Rows that gave their pages to older"
                                 " ones, to come back later.", registry=registry)  # fmt: skip
        self._ended = Counter("chatglm_requests", "Answers, by their ends.", ["end"],
                              registry=registry)  # fmt: skip
        self._refused = Counter("chatglm_requests_refused", "Requests not taken, by reason.",
                                ["reason"], registry=registry)  # fmt: skip
        self._first = Histogram("chatglm_first_token_seconds", "From arrival to the first token.",
                                buckets=LATENCIES, registry=registry)  # fmt: skip
        self._between = Histogram("chatglm_token_seconds", "Between two tokens of an answer.",
                                  buckets=TOKEN_SECONDS, registry=registry)  # fmt: skip
        self._seconds = Histogram("chatglm_request_seconds", "From arrival to the end.",
                                  buckets=REQUEST_SECONDS, registry=registry)  # fmt: skip

    def load(self, running: int, waiting: int, pages: int) -> None:
        """As it is now."""
        self._running.set(running)
        self._waiting.set(waiting)
        self._pages.set(pages)

    def read_prompts(self, tokens: int) -> None:
        """Prompts of so many tokens are read for the first time."""
        self._read.inc(tokens)

    def token(self, seconds: float, *, is_first: bool) -> None:
        """A token came, so long after the one before it, or after the arrival."""
        self._generated.inc()
        (self._first if is_first else self._between).observe(seconds)

    def put_back(self, rows: int) -> None:
        """Rows went back to the queue for want of pages."""
        self._put_back.inc(rows)

    def ended(self, end: str, seconds: float) -> None:
        """An answer is over: stop, length, error or cancelled."""
        self._ended.labels(end).inc()
        self._seconds.observe(seconds)

    def refused(self, reason: str) -> None:
        """A request was not taken."""
        self._refused.labels(reason).inc()

    def text(self) -> bytes:
        """In Prometheus's format."""
        return generate_latest(self.registry)
