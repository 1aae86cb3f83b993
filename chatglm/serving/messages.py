"""OpenAI's requests and answers to and from ours.

What this server can't honour is a field that allows its neutral value alone, so that a client that
asks for it is told so (400), instead of getting another answer than it thinks.
"""

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ..errors import ToolkitError
from ..kernels.ops import MOST_TOP_K
from ..prompts import build_prompt
from ..sampling import Sampling

MOST_CHOICES = 16
NEUTRAL_ONLY = {
    "audio", "best_of", "echo", "frequency_penalty", "function_call", "functions", "logit_bias",
    "logprobs", "modalities", "prediction", "presence_penalty", "reasoning_effort",
    "response_format", "store", "suffix", "tool_choice", "tools", "top_logprobs",
    "web_search_options",
}  # fmt: skip
"""Fields of OpenAI's that are refused unless they ask for nothing."""


class BadRequest(ToolkitError):
    """A request that can't be served. param: the field; code: OpenAI's word for it."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.param, self.code = param, code


def _encodable(text: str) -> str:
    text.encode()  # a lone surrogate is a ValueError
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Stop = Annotated[Text, Field(min_length=1, max_length=256)]
Nothing = Annotated[list[Any], Field(max_length=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class Message(_Strict):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = None
    # Neutral values only: what an answer that is sent back may hold.
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing | None = None
    annotations: Nothing | None = None

    @property
    def text(self) -> str:
        """All of it."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class StreamOptions(_Strict):
    """What a stream tells beside the answer."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class TextFormat(_Strict):
    """The only format of answers."""

    type: Literal["text"]


class _Generation(_Strict):
    """What chat and completion requests have in common."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: Temperature | None = Field(None, description="0: the likeliest token always")
    top_p: Share | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    top_k: Annotated[int, Field(ge=1, le=MOST_TOP_K)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    # Neutral values only.
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None

    @property
    def choices(self) -> int:
        """How many answers are wanted."""
        return 1 if self.n is None else self.n

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end an answer."""
        stop = [] if self.stop is None else self.stop
        return (stop,) if isinstance(stop, str) else tuple(stop)

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with its number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self) -> Sampling:
        """The rules asked for, and the released chat's where nothing is."""
        return sampling_of(self.temperature, self.top_p, self.top_k, self.repetition_penalty)

    def check(self) -> None:
        """What fields can't say alone.

        Raises:
            BadRequest: naming the field.
        """
        if self.stream_options is not None and not self.stream:
            raise BadRequest("stream_options needs stream: true", param="stream_options")


class ChatRequest(_Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    # Neutral values only.
    logprobs: Literal[False] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    response_format: TextFormat | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    store: Literal[False] | None = None
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @property
    def most_tokens(self) -> int | None:
        """Of the answer; its two names, of which the newer wins."""
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer

    def prompt(self) -> str:
        """The text that the model continues: see `conversation`."""
        query, history = conversation(self.messages)
        return build_prompt(query, history)


class CompletionRequest(_Generation):
    """POST /v1/completions; the prompt is given to the model without a template."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_CHOICES)]
        | Annotated[list[int], Field(min_length=1)]
        | Annotated[list[list[int]], Field(min_length=1, max_length=MOST_CHOICES)]
    )
    # Neutral values only.
    echo: Literal[False] | None = None
    logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    suffix: Literal[""] | None = None

    @property
    def most_tokens(self) -> int | None:
        """Of the answer."""
        return self.max_tokens

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or more, as text or as token ids."""
        given: Any = self.prompt
        alone = isinstance(given, str) or isinstance(given[0], int)
        return [given] if alone else given


class SeedRequest(BaseModel):
    """POST /, as the released api.py has it."""

    model_config = ConfigDict(extra="forbid")
    prompt: Text
    history: Annotated[list[tuple[Text, Text]], Field(max_length=1000)] | None = None
    max_length: Annotated[int, Field(ge=2)] | None = None
    top_p: Share | None = None
    temperature: Temperature | None = None


def sampling_of(
    temperature: float | None,
    top_p: float | None,
    top_k: int | None = None,
    repetition_penalty: float | None = None,
) -> Sampling:
    """The rules asked for; the released chat's where None. A temperature of 0 is greedy."""
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k,
             "repetition_penalty": repetition_penalty}  # fmt: skip
    asked: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if temperature is not None and temperature < 1e-3:  # 0, or so little that it is the same
        return Sampling(do_sample=False, **{**asked, "temperature": 1.0})
    return Sampling(**asked)


def conversation(messages: Sequence[Message]) -> tuple[str, list[tuple[str, str]]]:
    """The last question, and the rounds before it.

    The model knows questions and answers only: what a system message says stands before the first
    question that follows it. Messages of one side in a row are one.

    Raises:
        BadRequest: if the last message is not the user's.
    """
    if messages[-1].role != "user":
        raise BadRequest("the last of the messages must be of role user", param="messages")
    rounds: list[tuple[list[str], list[str]]] = [([], [])]
    for message in messages:
        if message.role == "assistant":
            rounds[-1][1].append(message.text)
            continue
        if rounds[-1][1]:  # answered already
            rounds.append(([], []))
        rounds[-1][0].append(message.text)
    joined = [("\n".join(asked), "\n".join(answered)) for asked, answered in rounds]
    return joined[-1][0], joined[:-1]


class Shape:
    """The JSON of one answer, whole or in pieces: chat.completion or text_completion."""

    def __init__(self, model: str, *, is_chat: bool):
        self.is_chat = is_chat
        self._head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._kind = "chat.completion" if is_chat else "text_completion"

    def whole(
        self, texts: Sequence[str], reasons: Sequence[str | None], usage: dict[str, int]
    ) -> dict[str, Any]:
        """All choices."""
        choices = [
            {
                "index": number,
                **({"message": {"role": "assistant", "content": text}}
                   if self.is_chat else {"text": text}),
                "logprobs": None,
                "finish_reason": reason,
            }
            for number, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]  # fmt: skip
        return {**self._head, "object": self._kind, "choices": choices, "usage": usage}

    def first(self, number: int) -> dict[str, Any]:
        """What opens a choice of a chat."""
        return self._chunk(
            [{"index": number, "delta": {"role": "assistant", "content": ""},
              "logprobs": None, "finish_reason": None}]
        )  # fmt: skip

    def piece(self, number: int, text: str, reason: str | None) -> dict[str, Any]:
        """More of a choice."""
        delta = {"delta": {"content": text} if text else {}} if self.is_chat else {"text": text}
        return self._chunk([{"index": number, **delta, "logprobs": None, "finish_reason": reason}])

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """The end of a stream that was asked for it."""
        return {**self._chunk([]), "usage": usage}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.is_chat else self._kind
        return {**self._head, "object": kind, "choices": choices}


def usage_of(prompt_tokens: int, answer_tokens: int) -> dict[str, int]:
    """OpenAI's count."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": answer_tokens,
        "total_tokens": prompt_tokens + answer_tokens,
    }


def error_body(
    message: str, *, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's form of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
