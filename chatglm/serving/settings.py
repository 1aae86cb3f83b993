"""How the server serves: where it listens, and its limits."""

from dataclasses import dataclass, field

from ..errors import ToolkitError
from ..settings import at_least


@dataclass(frozen=True)
class ServeSettings:
    """How infer_api.py serves; its limits keep one client from harming the others."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 opens the server to the network: set api_keys_file then."""
    port: int = 56780
    """Port to listen on."""
    served_model_name: str = "chatglm-6b"
    """Name of the model in requests; adapters have their own names, "base" is the bare weights."""
    max_running: int = 32
    """Answers that are written at the same time."""
    max_waiting: int = 256
    """Requests that wait for their turn; beyond it the server answers 503 and when to retry."""
    max_requests_per_client: int = 64
    """Requests that one client (an API key, else an address) may have at a time."""
    max_total_tokens: int | None = None
    """Tokens of a prompt and its answer together; null: as many as the model reads."""
    kv_cache_tokens: int | None = None
    """Tokens whose keys and values there is room for, of all answers together; null: what memory
    allows, at most max_running of the longest."""
    prefill_tokens: int = 4096
    """Tokens of prompts that are read in one go; a longer one alone."""
    max_body_bytes: int = 1 << 20
    """Size of a request."""
    deadline_seconds: float = 600.0
    """A request that took so long, waiting included, is ended with an error."""
    grace_seconds: float = 30.0
    """After SIGTERM, running answers have so long to end."""
    api_keys_file: str | None = None
    """File of API keys, one a line; so is the environment's CHATGLM_API_KEYS, separated by commas.
    null, and none there: no key is asked for."""
    cors_origins: list[str] = field(default_factory=list)
    """Web pages of these origins may call the server from a browser, such as https://example.com."""
    log_prompts: bool = False
    """Write questions and answers to the log."""

    def __post_init__(self):
        at_least(self, 1, "max_running", "max_waiting", "max_requests_per_client")
        at_least(self, 1, "kv_cache_tokens", "prefill_tokens", "max_body_bytes")
        at_least(self, 16, "max_total_tokens")
        at_least(self, 0, "port", "deadline_seconds", "grace_seconds")
        if self.port > 65535:
            raise ToolkitError(f"port {self.port}: allowed is 0 (any free one) to 65535")
