"""What the C library does with freed memory while networks work; one rule for the whole process."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

from russet.backends.cpu import malloc

_RULES = {"kept": malloc.kept, "returned": malloc.returned}
_lock = threading.RLock()
_stack = contextlib.ExitStack()
_current: tuple[Any, str] | None = None


def keep(user: Any, rule: str) -> None:
    """Has a rule hold from now on, until another user wants another or this one releases it."""
    global _current, _stack
    if _current is not None and _current[0] is user and _current[1] == rule:
        return
    with _lock:
        if _current is None or _current[1] != rule:
            _stack.close()
            _stack = contextlib.ExitStack()
            _stack.enter_context(_RULES[rule]())
        _current = user, rule


def release(user: Any) -> None:
    """Ends the rule that this user wanted last."""
    global _current
    with _lock:
        if _current is not None and _current[0] is user:
            _stack.close()
            _current = None
