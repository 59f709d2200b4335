"""Lanes whose jobs run when a seed says so: late, out of order across lanes and within them."""

import random

import torch

from offload.tiers.lanes import Transfer


class SeededTransfer(Transfer):
    """Waiting runs jobs until it is done."""

    def settle(self):
        while not self.done():
            self.owner_of_time.step()

    def wait(self):
        self.settle()
        super().wait()


class SeededTime:
    """Decides which job of which lane comes next; ``now`` is virtual."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.lanes = []
        self.now = 0.0
        self.failing = 0.0  # share of jobs that fail

    def lane(self, name, journal):
        self.lanes.append(SeededLane(name, journal, self))
        return self.lanes[-1]

    def step(self):
        """One job, of a lane chosen by the seed, ends."""
        busy = [lane for lane in self.lanes if lane.jobs]
        self.random.choice(busy).run_one()

    def pass_by(self):
        """Some jobs end, or none."""
        for _ in range(self.random.choice((0, 0, 1, 2, 5))):
            if any(lane.jobs for lane in self.lanes):
                self.step()

    def settle(self):
        while any(lane.jobs for lane in self.lanes):
            self.step()


class SeededLane:
    """A stand-in for ``Lane``; see ``SeededTime``."""

    def __init__(self, name, journal, time):
        self.name, self.journal, self.time = name, journal, time
        self.jobs = []
        self.submitted = []

    def submit(self, jobs, label, nbytes, *, urgent=False, owner=None):
        transfer = SeededTransfer(label, nbytes, len(jobs), owner)
        transfer.owner_of_time = self.time
        self.submitted.append((label, nbytes))
        if label.dst == "host" and label.src != "host":  # unread memory holds poison
            torch.empty(0, dtype=torch.uint8).set_(owner).fill_(0xFF)
        self.jobs += [(transfer, job) for job in jobs]
        return transfer

    def expedite(self, transfer):
        self.jobs.sort(key=lambda entry: entry[0] is not transfer)

    def run_one(self):
        # The first transfers of the queue are under way at once; each begins its jobs in order.
        transfers = list(dict.fromkeys(transfer for transfer, _ in self.jobs))[:3]
        chosen = self.time.random.choice(transfers)
        at = next(at for at, (transfer, _) in enumerate(self.jobs) if transfer is chosen)
        transfer, job = self.jobs.pop(at)
        transfer.started_s = transfer.started_s or self.time.now
        self.time.now += self.time.random.random()
        error = None
        try:
            job()
            if self.time.random.random() < self.time.failing:
                raise OSError(5, "bad lane")
        except OSError as caught:
            error = caught
        if transfer._finish_job(error):
            transfer.ended_s = self.time.now
            transfer._complete()
            if transfer.error is None:
                duration_s = transfer.ended_s - transfer.started_s
                self.journal.moved(transfer.label, transfer.nbytes, duration_s, self.name)
