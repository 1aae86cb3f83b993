"""A conversation with the model, as the released `chat` and `stream_chat` hold it."""

import bisect
import logging
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from transformers import LogitsProcessorList

from .decoding import generate_tokens
from .errors import ToolkitError
from .growing_text import GrowingText
from .prompts import build_prompt, clean_response
from .sampling import Sampling

logger = logging.getLogger("chatglm")

History = list[tuple[str, str]]
ANSWER_ROOM = 256
"""Tokens kept free for an answer before old rounds are dropped (an eighth of 2048)."""


def fit_prompt(
    tokenizer, query: str, history: History, *, max_length: int, max_new_tokens: int | None
) -> tuple[list[int], int]:
    """Token ids of the prompt and the number of oldest rounds dropped so that it fits.

    Raises:
        ToolkitError: if the query alone leaves no room for an answer within max_length.
    """
    room = max_new_tokens if max_new_tokens is not None else min(ANSWER_ROOM, max_length // 8)

    def encoded(dropped: int) -> list[int]:
        return tokenizer.encode_prompt(build_prompt(query, history[dropped:]))

    def fits(dropped: int) -> bool:
        return len(encoded(dropped)) + room <= max_length

    dropped = bisect.bisect_left(range(len(history)), True, key=fits)
    ids = encoded(dropped)
    alone = dropped == len(history) and max_new_tokens is None  # any answer is better than none
    if len(ids) + (1 if alone else room) <= max_length:
        return ids, dropped
    raise ToolkitError(
        f"the question is {len(ids)} tokens long; with room for an answer"
        f" ({1 if max_new_tokens is None else room}) max_length {max_length} is exceeded:"
        " shorten the question, or raise max_length up to the model's max_sequence_length"
    )


class ChatMixin:
    """`chat` and `stream_chat` for a model that generates."""

    config: Any
    device: Any
    generate: Any

    def chat(
        self,
        tokenizer,
        query: str,
        history: History | None = None,
        max_length: int = 2048,
        num_beams: int = 1,
        do_sample: bool = True,
        top_p: float = 0.7,
        temperature: float = 0.95,
        logits_processor: LogitsProcessorList | None = None,
        *,
        top_k: int = 50,
        repetition_penalty: float = 1.0,
        max_new_tokens: int | None = None,
        eos_token_id: int | list[int] | None = None,
        seed: int | None = None,
        prompt_lookup_tokens: int = 0,
        kv_cache_bits: int = 16,
    ) -> tuple[str, History]:
        """The answer, and the history with this round appended.

        max_length counts prompt and answer together, max_new_tokens the answer alone; the
        tighter one holds. An answer cut by them, and rounds dropped from a history that is too
        long, are logged as warnings by the logger 'chatglm'. prompt_lookup_tokens and
        kv_cache_bits: see decoding.generate_tokens.

        Raises:
            ToolkitError: if the query alone does not fit, or a setting is out of range.
        """
        if num_beams == 1:
            answers = self.stream_chat(
                tokenizer, query, history, max_length, do_sample, top_p, temperature,
                logits_processor, top_k=top_k, repetition_penalty=repetition_penalty,
                max_new_tokens=max_new_tokens, eos_token_id=eos_token_id, seed=seed,
                prompt_lookup_tokens=prompt_lookup_tokens, kv_cache_bits=kv_cache_bits,
            )  # fmt: skip
            return deque(answers, maxlen=1).pop()
        if num_beams < 1:
            raise ToolkitError(f"num_beams {num_beams}: allowed is 1 and above")
        Sampling(do_sample, top_p, temperature, top_k, repetition_penalty)  # refuses bad values
        for name, value, unset in (("seed", seed, None), ("kv_cache_bits", kv_cache_bits, 16),
                                   ("prompt_lookup_tokens", prompt_lookup_tokens, 0)):  # fmt: skip
            if value != unset:
                raise ToolkitError(
                    f"{name} has no effect on beams: set num_beams to 1 or drop {name}"
                )
        rounds = list(history or [])
        ids, limit = self._start(tokenizer, query, rounds, max_length, max_new_tokens)
        output = self.generate(
            input_ids=torch.tensor([ids], device=self.device),
            max_new_tokens=limit,
            num_beams=num_beams,
            do_sample=do_sample,
            top_p=top_p,
            temperature=temperature,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            logits_processor=logits_processor,
            eos_token_id=self._ends(eos_token_id),
        )
        answer_ids = output[0, len(ids) :].tolist()
        self._say_if_cut(answer_ids, limit, self._ends(eos_token_id))
        response = clean_response(tokenizer.decode(answer_ids))
        return response, [*rounds, (query, response)]

    def stream_chat(
        self,
        tokenizer,
        query: str,
        history: History | None = None,
        max_length: int = 2048,
        do_sample: bool = True,
        top_p: float = 0.7,
        temperature: float = 0.95,
        logits_processor: LogitsProcessorList | None = None,
        *,
        top_k: int = 50,
        repetition_penalty: float = 1.0,
        max_new_tokens: int | None = None,
        eos_token_id: int | list[int] | None = None,
        seed: int | None = None,
        prompt_lookup_tokens: int = 0,
        kv_cache_bits: int = 16,
    ) -> Iterator[tuple[str, History]]:
        """Yield (answer so far, history) as the answer grows; arguments and errors as in `chat`.

        Every answer yielded begins with the one before it: text that a later token could still
        change (half a character, a mark that may become full-width) waits for that token.
        """
        rounds = list(history or [])
        sampling = Sampling(do_sample, top_p, temperature, top_k, repetition_penalty)
        ids, limit = self._start(tokenizer, query, rounds, max_length, max_new_tokens)
        ends = self._ends(eos_token_id)
        generator = None
        if seed is not None:
            generator = torch.Generator(self.device).manual_seed(seed)
        answer_ids: list[int] = []
        answer = GrowingText(tokenizer.decode)
        for token in generate_tokens(
            self,
            torch.tensor([ids], device=self.device),
            max_new_tokens=limit,
            sampling=sampling,
            eos_token_ids=ends,
            logits_processor=logits_processor,
            generator=generator,
            prompt_lookup_tokens=prompt_lookup_tokens,
            kv_cache_bits=kv_cache_bits,
        ):
            answer_ids.append(int(token[0]))
            if answer.add(answer_ids[-1]):
                yield answer.text, [*rounds, (query, answer.text)]
        self._say_if_cut(answer_ids, limit, ends)
        if answer.finish() or not answer.text:
            yield answer.text, [*rounds, (query, answer.text)]

    def _start(
        self, tokenizer, query: str, rounds: History, max_length: int, max_new_tokens: int | None
    ) -> tuple[list[int], int]:
        longest = self.config.max_sequence_length
        if not 1 < max_length <= longest:
            raise ToolkitError(f"max_length {max_length}: allowed is 2 to {longest} for this model")
        if max_new_tokens is not None and not 0 < max_new_tokens < max_length:
            raise ToolkitError(
                f"max_new_tokens {max_new_tokens}: allowed is 1 to {max_length - 1}, one below"
                " max_length"
            )
        ids, dropped = fit_prompt(
            tokenizer, query, rounds, max_length=max_length, max_new_tokens=max_new_tokens
        )
        if dropped:
            logger.warning(
                "the conversation is longer than max_length %d: the oldest %d of %d rounds were"
                " left out of the prompt", max_length, dropped, len(rounds),
            )  # fmt: skip
        limit = max_length - len(ids)
        return ids, limit if max_new_tokens is None else min(limit, max_new_tokens)

    def _ends(self, eos_token_id: int | list[int] | None) -> list[int]:
        ends = self.config.eos_token_id if eos_token_id is None else eos_token_id
        return [ends] if isinstance(ends, int) else list(ends)

    @staticmethod
    def _say_if_cut(answer_ids: list[int], limit: int, ends: list[int]) -> None:
        if len(answer_ids) >= limit and answer_ids[-1] not in ends:
            logger.warning("the answer was cut after %d tokens, before its end", limit)
