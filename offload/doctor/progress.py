"""What the doctor is doing, on stderr: one line that is overwritten on a terminal."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from offload.tiers.probe.links import Progress


@contextmanager
def shown() -> Iterator[Progress]:
    """A function that shows what comes next; silent where stderr is no terminal."""
    console = Console(stderr=True)
    with console.status("") as status:
        yield lambda text: status.update(Text(text))
