"""What may be written to a drive in a step, and what is reported of its life."""

import pytest
import torch

from offload.allocator.errors import BudgetError, CapacityError
from offload.swap.activations import ActivationCache
from offload.swap.homes import FileHome, MemoryHome
from offload.swap.writebudget import BudgetedHome, WriteBudget
from offload.tiers.filetier import FileTier, Lanes
from offload.tiers.journal import Journal
from offload.tiers.lanes import Lane
from offload.tiers.ram import RamTier

NUMEL = 20_000
NBYTES = 4 * NUMEL


@pytest.fixture
def journal():
    return Journal()


@pytest.fixture
def scratch(tmp_path, journal):
    lanes = Lanes(journal)
    with FileTier(tmp_path, None, lanes) as scratch:
        yield scratch
    lanes.close()


def test_a_budget_below_what_must_be_written_is_refused(journal):
    with pytest.raises(BudgetError, match=r"1000 bytes\) is too small.*1500 bytes") as caught:
        WriteBudget(journal, 1000, 1500)
    assert (caught.value.needed_nbytes, caught.value.budget_nbytes) == (1500, 1000)


def test_a_step_takes_what_the_others_leave(journal):
    budget = WriteBudget(journal, 1000, 300)
    budget.take(500)
    with pytest.raises(CapacityError, match="raise nvme_write_budget by 1 bytes for 201 B more"):
        budget.take(201)
    budget.take(200)
    assert budget.left_nbytes == 0


def test_what_the_others_wrote_is_measured(journal):
    budget = WriteBudget(journal, 1000, 300)
    budget.take(100)
    journal.totals.written_nbytes += 100 + 450
    budget.finish_step()
    assert budget.left_nbytes == 550
    journal.totals.written_nbytes += 2000  # more than is allowed, but it had to be
    budget.finish_step()
    assert budget.left_nbytes == 0


def test_activations_beyond_the_budget_stay_in_memory(journal, scratch):
    budget = WriteBudget(journal, 3 * NBYTES, 0)
    cache = ActivationCache(
        [BudgetedHome(FileHome(scratch), budget)], journal, limit_nbytes=2 * NBYTES, min_nbytes=0
    )
    handles = [cache.pack(torch.full((NUMEL,), float(seed))) for seed in range(7)]
    cache.close()
    assert journal.totals.written_nbytes == 3 * NBYTES
    assert cache.kept_nbytes == 4 * NBYTES  # twice the limit: the most it may
    with pytest.raises(CapacityError, match=r"can't leave it: file.*raise nvme_write_budget by"):
        cache.pack(torch.ones(NUMEL))
    for seed, handle in reversed(list(enumerate(handles))):
        assert torch.equal(cache.unpack(handle), torch.full((NUMEL,), float(seed)))
    budget.finish_step()
    handles.clear()
    del handle
    handles = [cache.pack(torch.full((NUMEL,), float(seed))) for seed in range(5)]
    cache.close()
    assert journal.totals.written_nbytes == 6 * NBYTES  # a new step, a new allowance


def test_what_a_full_drive_refuses_is_not_counted(journal, scratch, monkeypatch):
    home = BudgetedHome(FileHome(scratch), WriteBudget(journal, 1000, 0))

    def refuse(_nbytes):
        raise CapacityError("full")

    with monkeypatch.context() as patched:
        patched.setattr(scratch, "allocate", refuse)
        with pytest.raises(CapacityError, match="full"):
            home.allocate(1000)
    home.allocate(1000).release()


def test_the_next_home_takes_what_the_drive_may_not(journal, scratch):
    lanes = [Lane(name, 1, journal) for name in ("far→host", "host→far")]
    with RamTier(100 * NBYTES, name="far") as far:
        budget = WriteBudget(journal, NBYTES, 0)
        homes = [BudgetedHome(FileHome(scratch), budget), MemoryHome(far, *lanes)]
        cache = ActivationCache(homes, journal, limit_nbytes=0, min_nbytes=0)
        handles = [cache.pack(torch.full((NUMEL,), float(seed))) for seed in range(4)]
        cache.close()
        assert [handle.part.unit.home.name[:4] for handle in handles] == ["file"] + ["far"] * 3
        for seed, handle in enumerate(handles):
            assert torch.equal(cache.unpack(handle), torch.full((NUMEL,), float(seed)))
        handles.clear()
        del handle
        cache.close()
    for lane in lanes:
        lane.close()


def test_what_a_commit_may_write_is_left_to_it(journal):
    budget = WriteBudget(journal, 1000, 300)
    journal.totals.written_nbytes += 50
    budget.finish_step(owed_nbytes=700)
    assert budget.left_nbytes == 300
    journal.totals.written_nbytes += 800  # a commit and a step
    budget.finish_step(owed_nbytes=600)
    assert budget.left_nbytes == 200
