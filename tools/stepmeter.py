"""What a training step costs the process that makes it: seconds, processors, bytes of drives."""

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class StepMeter:
    """Figures of each step so far; JSON as they stand (``dataclasses.asdict``).

    Attributes:
        steps_s: from the step's begin to its end.
        processor_s: of all threads together, in the kernel and outside of it.
        read_nbytes: that drives gave, by the kernel's count.
        written_nbytes: that they took.
    """

    steps_s: list[float] = field(default_factory=list)
    processor_s: list[float] = field(default_factory=list)
    read_nbytes: list[int] = field(default_factory=list)
    written_nbytes: list[int] = field(default_factory=list)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one step."""
        read, written = moved_nbytes()
        began_s, processor_s = time.perf_counter(), time.process_time()
        yield
        self.processor_s.append(time.process_time() - processor_s)
        self.steps_s.append(time.perf_counter() - began_s)
        after = moved_nbytes()
        self.read_nbytes.append(after[0] - read)
        self.written_nbytes.append(after[1] - written)


def moved_nbytes() -> tuple[int, int]:
    """Bytes that this process has read from drives and written to them."""
    lines = Path("/proc/self/io").read_text().splitlines()
    fields = {name: int(value) for name, value in (line.split(": ") for line in lines)}
    return fields["read_bytes"], fields["write_bytes"]


def processors_s(processor_s: Sequence[float]) -> float:
    """The seconds in which all processors, none of them idle, do the work of the median step."""
    return statistics.median(processor_s) / len(os.sched_getaffinity(0))
