"""The one kind of error that is a user's to mend.

Scripts print it as a single line and exit with 2; everything else is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class ToolkitError(ValueError):
    """A user's mistake: says what was given, where, what is allowed and what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name closest to `name` as a hint, ' Did you mean ...?', or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""
