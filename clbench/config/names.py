"""What a message says where a name was wrong: the nearest of those that there are, then all of them."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(given: str, names: Iterable[str]) -> str:
    """A question that names what is spelled almost as `given`; "" where nothing is.

    >>> nearest("Sqe", ["er", "ewc", "seq", "seq_full"])
    'did you mean seq? '
    """
    spelled = {name.lower(): name for name in names}
    near = [spelled[found] for found in get_close_matches(given.lower(), spelled)]
    return f"did you mean {' or '.join(near)}? " if near else ""


def suggestion(given: str, names: Iterable[str]) -> str:
    """The nearest, then all, in their order.

    >>> suggestion("sqe", ["ewc", "seq"]), suggestion("zzz", ["ewc", "seq"])
    ('did you mean seq? choose one of ewc, seq', 'choose one of ewc, seq')
    """
    names = list(names)
    return f"{nearest(given, names)}choose one of {', '.join(names)}"
