"""Offload's file engines against fio, DeepSpeed's AIO, aiofiles and an io_uring binding.

All of them move the same blocks of one file by direct I/O, interleaved in one run. A survey finds
the champion of ours and that of the peers, for each block size and pattern. The two meet in rounds
of their own, at every number of blocks in flight, and each at its best of these rounds: so neither
who was lucky in the survey nor whose number was chosen by chance gains by it. The checks are the
medians of those rounds' ratios.
"""

import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchlib import Result, arguments, finish
from io_contenders import Buffers, Contender, Job, Pattern, Sample, contenders

PATTERNS: tuple[Pattern, ...] = ("read", "write", "mixed")
MIB = 1 << 20
_MOST_BLOCKS = 192  # of one sample


@dataclass(frozen=True)
class Sizes:
    """How much is measured: quick only shows that the tool works."""

    blocks: tuple[int, ...] = (1 * MIB, 8 * MIB, 32 * MIB)
    in_flight: tuple[int, ...] = (1, 2, 4, 8)
    rounds: int = 5
    duels: int = 15
    survey_nbytes: int = 192 * MIB
    duel_nbytes: int = 768 * MIB
    file_nbytes: int = 1024 * MIB


QUICK = Sizes(
    blocks=(8 * MIB,), in_flight=(1, 4), rounds=3, duels=3, survey_nbytes=64 * MIB,
    duel_nbytes=128 * MIB, file_nbytes=256 * MIB,
)  # fmt: skip


@dataclass
class Standing:
    """A contender at one number of blocks in flight, and its samples so far."""

    contender: Contender
    in_flight: int
    samples: list[Sample] = field(default_factory=list)

    def run(self, pattern: Pattern, block_nbytes: int, nbytes: int, most_nbytes: int) -> Sample:
        """One more sample."""
        count = max(nbytes // block_nbytes, 2 * self.in_flight)
        count = min(count, most_nbytes // block_nbytes)
        sample = self.contender.run(Job(pattern, block_nbytes, self.in_flight, count))
        self.samples.append(sample)
        return sample

    @property
    def bytes_per_s(self) -> float:
        """Median rate."""
        return statistics.median(sample.bytes_per_s for sample in self.samples)

    @property
    def cpu_s_per_gb(self) -> float:
        """Median processor seconds per GB."""
        return statistics.median(sample.cpu_s_per_gb for sample in self.samples)


def survey(
    everybody: list[Contender], pattern: Pattern, block_nbytes: int, sizes: Sizes
) -> list[Standing]:
    """Everybody at every number in flight, interleaved."""
    standings = [
        Standing(contender, in_flight) for in_flight in sizes.in_flight for contender in everybody
    ]
    for index in range(sizes.rounds):
        for standing in standings if index % 2 == 0 else reversed(standings):
            standing.run(pattern, block_nbytes, sizes.survey_nbytes, sizes.file_nbytes)
    return standings


def best_of(standings: list[Standing]) -> Standing:
    """The fastest of one contender."""
    return max(standings, key=lambda standing: standing.bytes_per_s)


def champion_of(bests: list[Standing]) -> Standing:
    """Of the contenders as fast as the fastest, by 5 %, the one with the least processor time."""
    able = [one for one in bests if one.bytes_per_s >= 0.95 * best_of(bests).bytes_per_s]
    return min(able, key=lambda standing: standing.cpu_s_per_gb)


def duel(
    mine: Contender, theirs: Contender, pattern: Pattern, block_nbytes: int, sizes: Sizes
) -> "Duel":
    """Both at every number in flight, interleaved; each side's best of these rounds meet."""
    sides = [
        [Standing(contender, in_flight) for in_flight in sizes.in_flight]
        for contender in (mine, theirs)
    ]
    standings = [one for pair in zip(*sides, strict=True) for one in pair]
    nbytes = min(sizes.duel_nbytes, _MOST_BLOCKS * block_nbytes)
    for index in range(sizes.duels):
        for standing in standings if index % 2 == 0 else reversed(standings):
            standing.run(pattern, block_nbytes, nbytes, sizes.file_nbytes)
    return Duel(*map(best_of, sides))


@dataclass(frozen=True)
class Duel:
    """What came of it: each side at its best."""

    mine: Standing
    theirs: Standing

    @property
    def rate(self) -> float:
        """Median over the rounds of my rate over theirs."""
        return statistics.median(
            one.bytes_per_s / other.bytes_per_s
            for one, other in zip(self.mine.samples, self.theirs.samples, strict=True)
        )

    def __str__(self) -> str:
        mine, theirs = self.mine, self.theirs
        return (
            f"{mine.contender.name} x{mine.in_flight} against the {theirs.contender.side} "
            f"{theirs.contender.name} x{theirs.in_flight}: {self.rate:.3f} of its rate, "
            f"{mine.cpu_s_per_gb:.4f} against {theirs.cpu_s_per_gb:.4f} CPU s/GB"
        )


def compare(
    everybody: list[Contender], sizes: Sizes, patterns: Sequence[Pattern], result: Result
) -> None:
    """Fill ``result``: a row for everybody's best, and the checks."""
    for block_nbytes in sizes.blocks:
        for pattern in patterns:
            standings = survey(everybody, pattern, block_nbytes, sizes)
            bests = [
                best_of([one for one in standings if one.contender is contender])
                for contender in everybody
            ]
            for best in bests:
                result.add(
                    block_nbytes=block_nbytes,
                    pattern=pattern,
                    who=best.contender.name,
                    in_flight=best.in_flight,
                    bytes_per_s=best.bytes_per_s,
                    cpu_s_per_gb=best.cpu_s_per_gb,
                )
            sides = {
                side: champion_of([best for best in bests if best.contender.side == side])
                for side in dict.fromkeys(contender.side for contender in everybody)
            }
            title = f"{block_nbytes // MIB} MiB {pattern}"
            mine = sides.pop("offload")
            for side, theirs in sides.items():
                found = duel(mine.contender, theirs.contender, pattern, block_nbytes, sizes)
                result.notes.append(f"{title}: {found}")
                if side == "peer" and block_nbytes >= 8 * MIB:
                    result.check(f"{title}: rate, ours over the best peer's", found.rate, 1.0)
                    spared = found.theirs.cpu_s_per_gb / found.mine.cpu_s_per_gb
                    result.check(f"{title}: CPU s/GB, the best peer's over ours", spared, 1.0)


def prepare(path: Path, nbytes: int, buffers: Buffers) -> None:
    """A file of random bytes that are on the disk: holes and fresh extents read too fast."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    try:
        block = buffers.take(1, 32 * MIB)[0]
        for at in range(0, nbytes, block.nbytes):
            os.pwrite(fd, block.view(), at)
        os.fsync(fd)
    finally:
        os.close(fd)


def main() -> int:
    """Run and print."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--block", type=int, metavar="MIB", help="of this size only")
    parser.add_argument("--pattern", choices=PATTERNS, help="this one only")
    parser.add_argument("--duels", type=int, help="rounds of a duel (default: 15)")
    options = parser.parse_args()
    sizes = QUICK if options.quick else Sizes()
    if options.block is not None:
        sizes = replace(sizes, blocks=(options.block * MIB,))
    if options.duels is not None:
        sizes = replace(sizes, duels=options.duels)
    patterns = PATTERNS if options.pattern is None else (options.pattern,)
    options.nvme.mkdir(parents=True, exist_ok=True)
    result = Result("File engines: best number in flight of each")
    buffers = Buffers()
    with tempfile.TemporaryDirectory(dir=options.nvme) as folder:
        path = Path(folder) / "data"
        prepare(path, sizes.file_nbytes, buffers)
        everybody, missing, notes = contenders(path, buffers)
        result.notes += notes
        try:
            compare(everybody, sizes, patterns, result)
        finally:
            for contender in everybody:
                contender.close()
    if options.quick:
        result.checks.clear()  # too short to tell
    result.notes += [f"could not be run: {text}" for text in missing]
    code = finish(result, options.json)
    return 1 if missing else code


if __name__ == "__main__":
    sys.exit(main())
