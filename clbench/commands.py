"""How every command ends: with what it gives, or with one line on standard error and an exit code.

2 is a mistake of the user's, 1 what failed and is none; what we got wrong is a traceback.
"""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from clbench.config.composition import MISTAKES, one_line
from clbench.config.secrets import masked
from clbench.types import NotWritten, RankFailed

T = TypeVar("T")
FAILED = (RankFailed, NotWritten)
FAILURES = (*MISTAKES, *FAILED)
"""What ends one job of a sweep and leaves the others alone; exit code 2 for the user's mistakes, else 1."""


def side_command(parser: ArgumentParser, action: Callable[[Namespace], T], arguments: Sequence[str] | None = None) -> T:
    """What `action` gives of the words on the command line, with the folder's own classes in reach; a mistake of the user's is one line."""
    options = parser.parse_intermixed_args(arguments)
    put_in_reach(Path.cwd())
    try:
        return action(options)
    except FAILURES as error:
        refuse(error)


def put_in_reach(folder: Path) -> None:
    """A yaml may name a class of `folder`, however clbench was started; a tasks.py or datasets.py there hides no package of the same name.

    A checkout of clbench that is started in its own folder stays first: another one may be installed.
    """
    if folder.resolve() == Path(__file__).resolve().parents[1]:
        return
    sys.path[:] = [*(entry for entry in sys.path if entry not in ("", str(folder))), str(folder)]


def refuse(error: Exception) -> NoReturn:
    """Ends the command with one line on standard error; exit code 2 for every mistake of the user's, 1 for a failure that is none."""
    # What a rank says may be our own mistake, of which every line helps.
    text = masked(str(error)) if isinstance(error, RankFailed) else one_line(error)
    print(f"clbench: {text}", file=sys.stderr)
    raise SystemExit(1 if isinstance(error, FAILED) else 2)
