"""The text of an answer while it grows, at a cost a token that doesn't grow with it.

The plain way, decoding and tidying the whole answer at every token, takes half a millisecond at
1000 tokens: nothing for one conversation, but more than a GPU's step for 32. Here a token is
decoded beside the few before it, and only text that the next token may still change is looked at
again. The result is that of the plain way.
"""

from collections.abc import Callable

from .prompts import settled_length, tidied

CONTEXT_TOKENS = 4
"""Tokens decoded again before a new one, so that it is read as in its place."""
_UNFINISHED = "\ufffd"  # a character whose bytes are not all there
_LONGEST_CHARACTER = 4  # bytes, of which each may be a token


class GrowingText:
    """An answer's text, cleaned as prompts.clean_response does, and cut at the first stop string.

    decode: text of token ids. stops: strings that end the answer and are not part of it.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: tuple[str, ...] = ()):
        self._decode, self._stops = decode, stops
        self._ids: list[int] = []  # a context that is told, and what is not told yet
        self._told = 0
        self._told_length = 0  # of the context's text
        self._raw = ""  # not cleaned yet, since the next token may change how
        self._last = ""  # the character before it
        self._held = ""  # cleaned, but perhaps the beginning of a stop string
        self.text = ""
        """What can't change any more."""
        self.is_stopped = False
        """A stop string was found; what follows it is left out."""

    def add(self, token: int) -> str:
        """Take one more token in; gives what is new in `text`."""
        if self.is_stopped:
            return ""
        self._ids.append(token)
        whole = self._decode(self._ids)
        unfinished = len(self._ids) - self._told < _LONGEST_CHARACTER
        if whole.endswith(_UNFINISHED) and unfinished:
            return ""
        self._raw += whole[self._told_length :]
        self._keep_context()
        length = settled_length(self._raw)
        settled, self._raw = self._raw[:length], self._raw[length:]
        return self._show(self._cleaned(settled))

    def finish(self) -> str:
        """The answer is over: what was held back counts now. Gives what is new in `text`."""
        if self.is_stopped:
            return ""
        rest = self._raw + self._decode(self._ids)[self._told_length :]
        self._ids, self._raw = self._ids[: self._told], ""
        shown = self._show(self._cleaned(rest.rstrip()))
        if self.is_stopped:
            return shown
        held, self._held = self._held, ""
        self.text += held
        return shown + held

    def _keep_context(self) -> None:
        """The last tokens stay, and more where they are no text: a first space is never shown."""
        count = CONTEXT_TOKENS
        while True:
            context = self._ids[-count:]
            text = self._decode(context)
            if text.strip() or count >= len(self._ids):
                break
            count *= 2
        self._ids, self._told, self._told_length = context, len(context), len(text)

    def _cleaned(self, raw: str) -> str:
        """raw as it looks behind what was cleaned before it."""
        if not self._last:
            raw = raw.lstrip()
        if not raw:
            return ""
        cleaned = tidied(self._last + raw)[len(self._last) :]
        self._last = raw[-1]
        return cleaned

    def _show(self, text: str) -> str:
        """Add text, but for what a stop string may begin with."""
        text = self._held + text
        found = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            shown = text[: min(found)]
        else:
            held = max((_overlap(text, stop) for stop in self._stops), default=0)
            shown, self._held = text[: len(text) - held], text[len(text) - held :]
        self.text += shown
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that stop begins with."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
