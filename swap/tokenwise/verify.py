"""Rebuilds, at the end of a forward that has kept everything, to compare and to measure."""

from functools import partial

import torch

from offload.swap.tokenwise.analyse import Chain
from offload.swap.tokenwise.compare import Comparison, Rehearsal
from offload.swap.tokenwise.cuts import Cuts
from offload.swap.tokenwise.passes import BlockPass
from offload.swap.tokenwise.replay import Replay, Sink
from offload.swap.tokenwise.timing import Stopwatch, Timer


class KeptForward:
    """A forward that has swapped everything whole.

    Args:
        timer: measures rebuilding.
        relaxed: accept rows that differ in the last bits.

    Attributes:
        worst_error: the largest relative difference that was accepted.
    """

    def __init__(self, block_pass: BlockPass, timer: Timer, *, relaxed: bool) -> None:
        self.worst_error = 0.0
        self._pass = block_pass
        self._timer = timer
        self._relaxed = relaxed

    def verify(self, cuts: Cuts, cut: int) -> bool:
        """Rebuild and compare: ``cuts`` [Note: verified cuts].

        Returns:
            Whether that is settled; if not, the next forward keeps the sources that it takes.
        """
        while not (tried := cuts.at(cut)).settled:
            if not self._keeps_sources(tried.chain):
                return False
            failed = self._compare(tried.replay)
            if failed:
                cuts.fail(cut, failed)
            else:
                cuts.verify(cut)
        return True

    def rehearse(self, replay: Replay) -> None:
        """Measure the rebuild behind a verified cut, and estimate what copying heads takes.

        All rows of every target are copied twice: the largest one is, once.
        """
        if not self._keeps_sources(replay.chain):
            return  # backward will tell
        figures = self._pass.measurements.of(replay.chain)
        rebuilding, copying = self._timer.stopwatch(), self._timer.stopwatch()
        self._rebuild(replay, self._rehearsal(replay), rebuilding)
        rebuilding.tell(partial(figures.rebuild, replay.cut))
        targets, rows = replay.chain.targets, replay.chain.program.rows
        tensor = self._pass.saved(max(targets, key=lambda target: target.nbytes).storage)
        copy = torch.empty_like(tensor)
        with copying:
            copy.copy_(tensor)
        scale = 2 * sum(target.nbytes for target in targets) / tensor.nbytes
        copying.tell(lambda seconds: figures.estimate_heads(rows, scale * seconds))

    def _rehearsal(self, replay: Replay) -> Rehearsal:
        return Rehearsal(replay, self._pass.device, self._timer.accelerator)

    def _compare(self, replay: Replay) -> dict[int, str]:
        """The targets whose rebuilt rows differ from the saved ones, with the reason."""
        comparison = Comparison(
            replay,
            self._pass.saved,
            self._pass.device,
            accelerator=self._timer.accelerator,
            relaxed=self._relaxed,
        )
        try:
            self._rebuild(replay, comparison, self._timer.stopwatch())
        except RuntimeError as fault:
            rows = replay.chain.program.rows
            reason = f"its operations can't be executed behind cut {replay.cut} of {rows}: {fault}"
            return {target.storage: reason for target in replay.chain.targets}
        self.worst_error = max(self.worst_error, comparison.worst_error)
        return comparison.failed

    def _rebuild(self, replay: Replay, sink: Sink, computing: Stopwatch) -> None:
        """Rebuild every target, part by part, from what this forward has kept."""
        chain = replay.chain
        for part in sorted({target.part for target in chain.targets}):
            roots = [target.root for target in chain.targets if target.part == part]
            sources = {value: self._source(chain, value) for value in replay.sources_of(roots)}
            self._pass.run(replay, roots, sources, sink, computing)

    def _keeps_sources(self, chain: Chain) -> bool:
        """Whether this forward has kept all tensors that the chain starts from."""
        values, kept = chain.program.values, self._pass
        return all(
            value in kept.packed_sources
            or (values[value].kind == "made" and values[value].storage in kept.packed_saved)
            for value in chain.sources
        )

    def _source(self, chain: Chain, value: int) -> torch.Tensor:
        if value in self._pass.packed_sources:
            return self._pass.keeper.unpack(self._pass.packed_sources[value])
        return self._pass.saved(chain.program.values[value].storage)
