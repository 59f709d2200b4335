"""Functions that run in turns: each on a thread of its own, exactly one of them at any moment.

[Note: one at a time] Whoever runs holds the turn, and gives it to another by releasing the lock
which that one waits for. So nothing here, and nothing that the functions share, is ever touched
by two threads at once, and what one has written the next one sees. Only ``stop`` may come from
outside, from the handler of a signal: it sets an error and a flag, which the runner sees at its
next turn.

Threads rather than generators, for a function gives its turn away from the depth of somebody
else's code; and rather than stacks switched in one thread, for what torch keeps for each thread
(grad mode, hooks, the backward that runs) is then every function's own.

[Note: interrupts] Python runs the handlers of signals on the main thread, between any two
instructions. If that is the caller it must know at each of them whether there are threads: so it
starts but one, in a single call, which starts the others and gives the first turn away, and waits
from then on in a call that may be interrupted and repeated.
"""

import _thread
import contextvars
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

_Result = TypeVar("_Result")


class StoppedError(BaseException):
    """Ends a function because another one failed; never reaches the caller of ``run``."""


class _Runner(Generic[_Result]):
    """One function, its thread's lock, and how often it has had its turn."""

    __slots__ = ("ended", "function", "go", "index", "is_ready", "result", "turns")

    def __init__(self, index: int, function: Callable[[], _Result]) -> None:
        self.index = index
        self.function = function
        self.turns = 0
        self.ended = True  # or not yet begun
        self.is_ready: Callable[[], bool] = _always
        self.result: list[_Result] = []  # none yet, or one
        self.go = threading.Lock()
        self.go.acquire()


class Relay(Generic[_Result]):
    """Runs ``functions`` in turns; their order is that of their places in it.

    Args:
        name: of one function, for threads and errors.
        leaving: called as a turn ends, with the place of who ran; True: from now on each function
            runs to its end before the next one goes on.
        entering: called as one begins, with the place of who runs; None at the end of all.
    """

    def __init__(
        self,
        functions: Sequence[Callable[[], _Result]],
        *,
        name: str = "function",
        leaving: Callable[[int], bool] = lambda _index: False,
        entering: Callable[[int | None], None] = lambda _index: None,
    ) -> None:
        self._name = name
        self._leaving = leaving
        self._entering = entering
        self._one_by_one = False
        self._runners = [_Runner(index, function) for index, function in enumerate(functions)]
        self._here = threading.local()
        self._error: BaseException | None = None
        self._stopping = False
        self._all_ended = False
        self._end = threading.Lock()
        self._end.acquire()

    def run(self) -> list[_Result]:
        """Run all of them to their ends; what they returned.

        All threads have ended when this returns or raises.

        Raises:
            Exception: what the first of them raised that failed, with a note of which one it was;
                or what the handler of a signal raised here meanwhile (``KeyboardInterrupt``).
        """
        context = contextvars.copy_context
        threads = [
            threading.Thread(
                target=context().run,
                args=(self._run, runner),
                name=f"offload {self._name} {runner.index}",
                daemon=True,
            )
            for runner in self._runners
        ]
        is_begun = False
        while not self._all_ended:
            try:
                if not is_begun:
                    is_begun = True  # no handler runs between this and the call
                    _thread.start_new_thread(self._begin, (threads,))
                self._end.acquire()
            except BaseException as error:  # noqa: BLE001 (of a signal's handler, most often)
                self.stop(error)
                if isinstance(error, RuntimeError) and not any(one.ident for one in threads):
                    break  # not even the first could start; if it does yet, it does nothing
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # it holds the frames that hold this
        return [result for runner in self._runners for result in runner.result]

    def _begin(self, threads: Sequence[threading.Thread]) -> None:
        """Start all threads; on a thread of its own, see [Note: interrupts]."""
        try:
            for runner, thread in zip(self._runners, threads, strict=True):
                thread.start()
                runner.ended = False
        except RuntimeError as error:  # no more threads
            self.stop(error)
        self._give(None)

    def stop(self, error: BaseException) -> None:
        """End all of them at their next turns; ``run`` then raises ``error``, if it is the first.

        What the handler of a signal raises comes before an error.
        """
        if self._error is None or not isinstance(error, Exception):
            self._error = error
        self._stopping = True

    @property
    def count(self) -> int:
        """How many functions there are."""
        return len(self._runners)

    @property
    def current(self) -> int | None:
        """The place of the function that this thread runs; None on any other thread."""
        runner = getattr(self._here, "runner", None)
        return None if runner is None else runner.index

    @property
    def is_one_by_one(self) -> bool:
        """Whether each function runs to its end before the next one goes on."""
        return self._one_by_one

    def is_alive(self, index: int) -> bool:
        """Whether the function at ``index`` has not ended."""
        return not self._runners[index].ended

    def turn(self) -> None:
        """Let those go on that have had fewer turns; called by a function, else does nothing."""
        runner: _Runner[_Result] | None = getattr(self._here, "runner", None)
        if runner is not None:
            runner.turns += 1
            self._yield(runner)

    def wait_until(self, is_ready: Callable[[], bool]) -> None:
        """Let others go on until ``is_ready``, which must come true by those at lower places."""
        runner: _Runner[_Result] | None = getattr(self._here, "runner", None)
        if runner is not None and not is_ready():
            runner.is_ready = is_ready
            self._yield(runner)
            runner.is_ready = _always

    def _yield(self, runner: _Runner[_Result]) -> None:
        if not self._stopping and self._give(runner) is not runner:
            runner.go.acquire()
        if self._stopping:
            raise StoppedError

    def _next(self) -> _Runner[_Result] | None:
        """Who has the next turn: the lowest place among the fewest turns."""
        alive = [runner for runner in self._runners if not runner.ended]
        if self._stopping or self._one_by_one:
            return alive[0] if alive else None
        ready = (runner for runner in alive if runner.is_ready())
        return min(ready, key=lambda runner: (runner.turns, runner.index), default=None)

    def _give(self, runner: _Runner[_Result] | None) -> _Runner[_Result] | None:
        """``runner`` gives the turn away, if not to itself; None: nobody has it yet."""
        following: _Runner[_Result] | None = None
        try:
            if runner is not None and self._leaving(runner.index):
                self._one_by_one = True
            following = self._next()
            if following is runner:
                return runner
            self._entering(None if following is None else following.index)
        except BaseException as error:  # noqa: BLE001 (the turn must not be lost)
            self.stop(error)
            following = self._next()
        if following is None:
            self._all_ended = True
            self._end.release()
        elif following is not runner:
            following.go.release()
        return following

    def _run(self, runner: _Runner[_Result]) -> None:
        """The body of a thread."""
        self._here.runner = runner
        runner.go.acquire()
        try:
            if not self._stopping:
                runner.result.append(runner.function())
        except BaseException as error:  # noqa: BLE001 (``run`` raises it)
            if not self._stopping:
                error.add_note(f"in {self._name} {runner.index} of {len(self._runners)}")
                self.stop(error)
        finally:
            runner.ended = True
            del runner.function  # and what it holds: a batch
            self._give(runner)


def _always() -> bool:
    return True
