"""What striping over two unequal paths reaches of the sum of their rates, and sees of a slow one.

Two directories stand for two drives: each is held to a rate of its own, both directions
together, far below what the disk can do. Nothing else is arranged: the store measures the paths,
chooses the layout, and a streamed AdamW step reads {p, g, m, v} and writes {p, m, v}. Then one
path is slowed to a tenth, and the run must say so.
"""

import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import offload
from benchlib import Result, arguments, finish, quantiles
from offload.tiers.engines.threads import ThreadsEngine

REPEATS = 5
RATES = (300e6, 100e6)  # bytes per second
Move = Callable[[ThreadsEngine, int, int, int], int]


class Link:
    """A drive's own limit, shared by all files of a directory and both directions."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._free_s = 0.0
        self._lock = threading.Lock()

    def book(self, nbytes: int) -> float:
        """When so many bytes will have passed, behind all those that were booked before."""
        with self._lock:
            self._free_s = max(self._free_s, time.perf_counter()) + nbytes / self.bytes_per_s
            return self._free_s


def throttle(links: dict[Path, Link]) -> None:
    """Hold the engine of every file below a directory of ``links`` to its link's rate."""

    def throttled(move: Move) -> Move:
        def run(engine: ThreadsEngine, offset: int, address: int, nbytes: int) -> int:
            file = Path(f"/proc/self/fd/{engine._fd}").readlink()
            link = next((links[path] for path in links if file.is_relative_to(path)), None)
            passed_s = link.book(nbytes) if link else 0.0
            moved = move(engine, offset, address, nbytes)
            time.sleep(max(0.0, passed_s - time.perf_counter()))
            return moved

        return run

    for verb in ("read", "write"):
        setattr(ThreadsEngine, verb, throttled(getattr(ThreadsEngine, verb)))


class Weights(nn.Module):
    """Matrices whose gradients are cheap to make."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.matrices = nn.ParameterList(
            nn.Parameter(torch.zeros(width, width)) for _ in range(count)
        )

    def forward(self) -> torch.Tensor:
        return torch.stack([matrix.sum() for matrix in self.matrices]).sum()


class Training:
    """Streamed steps over some directories; ``rate`` times one."""

    def __init__(self, paths: list[Path], count: int, width: int) -> None:
        with offload.init(budget="host=1400MiB", nvme=paths):
            self.model = Weights(count, width)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.engine = offload.attach(self.model, self.optimizer, commit="manual")
        self.engine.keep_streaming()
        self.moved_nbytes = 7 * 4 * count * width * width

    def rate(self) -> float:
        """Bytes per second of one optimizer step."""
        self.model().backward()
        self.engine.gradients.drain()
        began_s = time.perf_counter()
        self.optimizer.step()
        step_s = time.perf_counter() - began_s
        self.optimizer.zero_grad()
        return self.moved_nbytes / step_s


def main() -> int:
    """Run and print."""
    options = arguments(__doc__ or "").parse_args()
    count, width = (6, 1024) if options.quick else (24, 1024)
    options.nvme.mkdir(parents=True, exist_ok=True)
    result = Result("Streamed AdamW step over two paths of unequal rates")
    with tempfile.TemporaryDirectory(dir=options.nvme.resolve()) as folder:
        paths = [Path(folder) / "fast", Path(folder) / "slow"]
        links = [Link(rate) for rate in RATES]
        throttle(dict(zip(paths, links, strict=True)))
        shares: dict[str, float] = {}
        for name, used in (("fast", paths[:1]), ("slow", paths[1:]), ("fast, slow", paths)):
            training = Training(used, count, width)
            rates = [training.rate() for _ in range(REPEATS + 2)][2:]
            limit = sum(links[paths.index(path)].bytes_per_s for path in used)
            shares[name] = statistics.median(rates) / limit
            result.add(
                paths=name,
                limit_bytes_per_s=limit,
                streamed_bytes_per_s=statistics.median(rates),
                share_min_median_max=quantiles([rate / limit for rate in rates]),
            )
            if used is paths:
                result.notes += [note for note in training.engine.notices if "stripes" in note]
                seen_s = _time_until_slow_is_seen(training, links[1])
            training.engine.detach()
            for path in used:
                _remove_store(path)
    result.notes.append(f"the slow path at a tenth of its rate: reported after {seen_s:.1f} s")
    if not options.quick:
        result.check("share of the sum of both rates", shares["fast, slow"], 0.9)
    return finish(result, options.json)


def _time_until_slow_is_seen(training: Training, link: Link) -> float:
    """Seconds of training until the run says that a path has become slow."""
    link.bytes_per_s /= 10
    began_s = time.perf_counter()
    while not any("has become slow" in note for note in training.engine.notices):
        training.rate()
    link.bytes_per_s *= 10
    return time.perf_counter() - began_s


def _remove_store(path: Path) -> None:
    for file in (path / "offload-store").iterdir():
        file.unlink()
    (path / "offload-store").rmdir()


if __name__ == "__main__":
    sys.exit(main())
