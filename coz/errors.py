"""The root of the errors that a user can mend: the entry points print them as one sentence and exit with 2."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake of the user or of the machine (a wrong value, a missing file, a full disk).

    The message says what is wrong, which value it was and what to do about it. It is raised before weights are
    loaded wherever that is possible. Anything else that escapes is a bug of ours and keeps its traceback.
    """


def exit_code(command: Callable[[], object]) -> int:
    """Run a command: 0, or 2 and one sentence on stderr where the user can mend it."""
    try:
        command()
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0
