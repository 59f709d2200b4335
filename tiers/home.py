"""The directories of a store: locked, checked against each other, and opened as tiers."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from offload.tiers.bandwidth import Measure
from offload.tiers.commit import CommitRecord, read_record, sync_directory
from offload.tiers.file import TierFile
from offload.tiers.filetier import FileTier, Lanes
from offload.tiers.folders import DATA, open_folders
from offload.tiers.health import PathHealth, SlowPath
from offload.tiers.layout import Layout, check_committed, check_uncommitted
from offload.tiers.striped import open_striped
from offload.tiers.stripes import UNIT_NBYTES, weights_for


class StoreHome:
    """One directory, or several that data is striped over, under exclusive locks.

    Attributes:
        directory: the store's own folder in the first directory; it has the commit record.
        layout: how data is striped; None in one directory. Set by ``open``.

    Raises:
        StoreInUseError: another process holds one of them.
        TierIOError: one can't be written, or is not Offload's.
    """

    def __init__(self, directories: Sequence[Path], lanes: Lanes, measure: Measure) -> None:
        self._folders = open_folders(directories)
        self._lanes = lanes
        self._measure = measure
        self.directory = self._folders[0].path
        self.record = self._folders[0].record
        self.layout: Layout | None = None
        self._health: PathHealth | None = None

    def open(self) -> CommitRecord | None:
        """The last commit, with the layout that it was made with; else a layout for a new store.

        Raises:
            StoreCorruptError: the record or a note is damaged.
            StoreMismatchError: a directory is missing, swapped or of another store.
            CapacityError: a disk has no room for the measurement.
        """
        committed = read_record(self.record)
        given = [folder.directory.absolute() for folder in self._folders]
        parts = [folder.read_part() for folder in self._folders]
        self.layout = None
        if committed is not None:
            if committed.layout is not None:
                self.layout = Layout.from_json(committed.layout)
            check_committed(given, parts, self.layout)
        else:
            check_uncommitted(given, parts, [folder.record.exists() for folder in self._folders])
            for folder in self._folders:
                folder.remove_data()
            if len(given) > 1:
                names, first = tuple(map(str, given)), parts[0]
                known = first is not None and first.directories == names
                self._lay_out(names, first.store if first and known else os.urandom(8).hex())
            else:
                self._folders[0].remove_part()  # of a striped store that was never committed
        if self.layout is not None:
            self._health = self._watch(self.layout)
        return committed

    def _lay_out(self, directories: tuple[str, ...], store: str) -> None:
        """Decide where the bytes of a new store go, and note it in each folder."""
        rates = tuple(self._measure([folder.path for folder in self._folders]))
        self.layout = Layout(
            store=store,
            directories=directories,
            unit_nbytes=UNIT_NBYTES,
            weights=weights_for([path.balanced_bytes_per_s for path in rates]),
            rates=rates,
        )
        for index, folder in enumerate(self._folders):
            folder.write_part(self.layout.part(index))

    def _watch(self, layout: Layout) -> PathHealth:
        """Tells the user what each path holds, and later which of them has become slow."""
        notice = self._lanes.journal.notice
        for directory, weight, rates in zip(
            layout.directories, layout.weights, layout.rates, strict=True
        ):
            holds = f"holds {weight} of every {sum(layout.weights)} stripes"
            if not weight:
                holds = "is too slow beside the others and holds nothing: leave it out"
            notice(
                directory,
                f"{holds}; measured reading {_rate(rates.read_bytes_per_s)}, "
                f"writing {_rate(rates.write_bytes_per_s)}",
            )

        def report(slow: SlowPath) -> None:
            notice(
                layout.directories[slow.path],
                f"has become slow: {_rate(slow.bytes_per_s)} now, "
                f"{_rate(slow.start_bytes_per_s)} when the store was made, and the other paths "
                "wait for it. Look at the disk; to stripe by what it does now, remove the "
                "offload-store folders and start anew",
            )

        return PathHealth(layout.rates, report)

    def open_tier(self, name: str | None, *, spare_nbytes: int = 0) -> FileTier:
        """The tier of the file ``name`` on all paths; None: unlinked scratch.

        Args:
            spare_nbytes: of each path's disk that it leaves free.

        Raises:
            TierIOError: a file can't be made.
        """
        engine = self._lanes.engine
        make = [
            partial(TierFile, folder.path, name, engine, spare_nbytes=spare_nbytes)
            for folder in self._folders
        ]
        if self.layout is None or self._health is None:
            return FileTier(self.directory, name, self._lanes, file=make[0]())
        file = open_striped(make, self.layout.stripes, self._health)
        return FileTier(self.directory, name, self._lanes, file=file)

    def open_data(self) -> FileTier:
        """The tier of the store's own file, whose names are durable then.

        Raises:
            TierIOError: a file can't be made.
        """
        tier = self.open_tier(DATA)
        for folder in self._folders[1:]:  # the first is flushed with each record
            sync_directory(folder.path)
        return tier

    def discard(self) -> None:
        """Give up whatever is there: the last commit, or parts of other stores.

        Raises:
            TierIOError: a disk could not take it.
        """
        for folder in self._folders:
            folder.discard()

    def close(self) -> None:
        """Give the locks back."""
        for folder in self._folders:
            folder.close()


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.3g} GB/s"
