"""Offload's file engines against fio, DeepSpeed's AIO, aiofiles and an io_uring binding.

All of them move the same blocks of one file by direct I/O, interleaved in one run. A survey finds
everybody's best number of blocks in flight. Then, for each block size and pattern, the champion of
ours meets that of the peers in rounds of their own, so that the one that was lucky in the survey
gains nothing by it; the checks are the medians of those rounds' ratios.
"""

import os
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from benchlib import Result, arguments, finish
from io_contenders import Buffers, Contender, Job, Pattern, Sample, contenders

PATTERNS: tuple[Pattern, ...] = ("read", "write", "mixed")
MIB = 1 << 20


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
    mine: Standing, theirs: Standing, pattern: Pattern, block_nbytes: int, sizes: Sizes
) -> tuple[float, float, float]:
    """Medians of the rates' ratio, and of both sides' processor seconds per GB."""
    ratios, mine_cpu, their_cpu = [], [], []
    for index in range(sizes.duels):
        pair = (mine, theirs) if index % 2 == 0 else (theirs, mine)
        found = {
            id(side): side.run(pattern, block_nbytes, sizes.duel_nbytes, sizes.file_nbytes)
            for side in pair
        }
        ratios.append(found[id(mine)].bytes_per_s / found[id(theirs)].bytes_per_s)
        mine_cpu.append(found[id(mine)].cpu_s_per_gb)
        their_cpu.append(found[id(theirs)].cpu_s_per_gb)
    return statistics.median(ratios), statistics.median(mine_cpu), statistics.median(their_cpu)


def compare(everybody: list[Contender], sizes: Sizes, result: Result) -> None:
    """Fill ``result``: a row for everybody's best, and the checks."""
    for block_nbytes in sizes.blocks:
        for pattern in PATTERNS:
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
                ratio, mine_cpu, their_cpu = duel(mine, theirs, pattern, block_nbytes, sizes)
                result.notes.append(
                    f"{title}: {mine.contender.name} x{mine.in_flight} against the {side} "
                    f"{theirs.contender.name} x{theirs.in_flight}: {ratio:.3f} of its rate, "
                    f"{mine_cpu:.4f} against {their_cpu:.4f} CPU s/GB"
                )
                if side == "peer" and block_nbytes >= 8 * MIB:
                    result.check(f"{title}: rate, ours over the best peer's", ratio, 1.0)
                    spared = their_cpu / mine_cpu
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
    options = arguments(__doc__ or "").parse_args()
    sizes = QUICK if options.quick else Sizes()
    options.nvme.mkdir(parents=True, exist_ok=True)
    result = Result("File engines: best number in flight of each")
    buffers = Buffers()
    with tempfile.TemporaryDirectory(dir=options.nvme) as folder:
        path = Path(folder) / "data"
        prepare(path, sizes.file_nbytes, buffers)
        everybody, missing, notes = contenders(path, buffers)
        result.notes += notes
        try:
            compare(everybody, sizes, result)
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
