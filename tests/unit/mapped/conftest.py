"""File tiers for mapped tensors, with and without ``O_DIRECT``."""

import pytest

from offload.tiers import file as file_module
from offload.tiers.filetier import FileTier, Lanes
from offload.tiers.journal import Journal


@pytest.fixture
def lanes():
    lanes = Lanes(Journal())
    yield lanes
    lanes.close()


@pytest.fixture(params=["direct", "cached"])
def any_tier(tmp_path, lanes, request, monkeypatch):
    """A file tier, with and without ``O_DIRECT``."""
    if request.param == "cached":
        monkeypatch.setattr(file_module, "_open_direct", lambda fd: fd)
    with FileTier(tmp_path, "data", lanes) as tier:
        yield tier


@pytest.fixture
def tier(tmp_path, lanes):
    with FileTier(tmp_path, "data", lanes) as tier:
        yield tier
