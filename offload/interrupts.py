"""Interrupts that Python would lose: those that arrive while a destructor runs.

[Note: lost interrupts] Python runs the handler of a signal between two instructions of the main
thread, be they those of a ``__del__`` or of a weak reference's callback. What the handler raises
there is printed and forgotten. Backward frees saved tensors one after the other, so that Ctrl-C
meets such a moment now and then. The hook for errors of this kind delivers the signal once more:
it comes between later instructions, until somebody is there to be told.
"""

import signal
import sys
import threading
from typing import Any

_DELAY_S = 0.05  # the hook has ended by then, on a busy machine too


def deliver_lost_interrupts() -> None:
    """Install the hook; safe to call twice."""
    previous = sys.unraisablehook
    if getattr(previous, "delivers_interrupts", False):
        return

    def hook(unraisable: Any) -> None:
        number = _signal_behind(unraisable.exc_value)
        if number is not None and threading.current_thread() is threading.main_thread():
            # Not here: the handler would raise in this hook, and be forgotten again.
            arguments = threading.main_thread().ident, number
            later = threading.Timer(_DELAY_S, signal.pthread_kill, arguments)
            later.daemon = True
            later.start()
        else:
            previous(unraisable)

    hook.delivers_interrupts = True  # type: ignore[attr-defined]
    sys.unraisablehook = hook


def _signal_behind(error: BaseException | None) -> int | None:
    """The signal whose handler raised ``error``: Python's own, or the launcher's."""
    if isinstance(error, KeyboardInterrupt):
        return signal.SIGINT
    if isinstance(error, SystemExit) and error.code == 128 + signal.SIGTERM:
        return signal.SIGTERM
    return None
