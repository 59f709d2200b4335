"""Which engine is chosen, why, and what is said where one can't be used."""

import ctypes
import sys

import pytest

import offload
from offload.allocator.errors import ConfigError
from offload.tiers import file as file_module
from offload.tiers.engines import deepspeed, kvikio
from offload.tiers.engines.base import OpenFile
from offload.tiers.engines.registry import (
    ENGINES,
    NAMES,
    check_engine,
    choose_engine,
    wrapping,
)
from offload.tiers.file import TierFile
from offload.tiers.hostmem import PAGE
from offload.tiers.testing import Memory, pattern
from offload.tiers.wrappers import Link, RecordingEngine, ThrottledEngine


@pytest.fixture
def without_direct_io(monkeypatch):
    monkeypatch.setattr(file_module, "_open_direct", lambda fd: fd)


def test_auto_takes_threads_and_needs_no_word_where_direct_io_works(tmp_path):
    chosen = choose_engine("auto", tmp_path)
    assert (chosen.name, chosen.expected, chosen.reason) == ("threads", True, "by direct I/O")


def test_auto_says_so_where_only_the_page_cache_is_left(tmp_path, without_direct_io):
    chosen = choose_engine("auto", tmp_path)
    assert (chosen.name, chosen.expected) == ("threads", False)
    assert chosen.reason == f"by the page cache, for {tmp_path} has no O_DIRECT"


def test_an_engine_that_was_asked_for_is_worth_a_word(tmp_path):
    assert choose_engine("threads", tmp_path).expected
    chosen = choose_engine("aiofiles", tmp_path)
    assert (chosen.expected, chosen.reason) == (False, "asked for; by direct I/O")


def test_a_directory_to_be_made_is_judged_by_its_parent(tmp_path):
    assert choose_engine("auto", tmp_path / "a" / "b").name == "threads"
    assert list(tmp_path.iterdir()) == []  # the probe leaves nothing


@pytest.mark.parametrize("name", ["threads", "aiofiles"])
def test_the_factory_makes_the_engine(tmp_path, name):
    with TierFile(tmp_path, None, choose_engine(name, tmp_path).factory) as file:
        assert file.engine.name == name


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("thread", "did you mean 'threads'?"),
        ("kviko", "did you mean 'kvikio'?"),
        ("zzz", f"known: {', '.join(NAMES)}"),
    ],
)
def test_an_unknown_engine_names_the_nearest(tmp_path, name, hint):
    with pytest.raises(ConfigError) as raised:
        choose_engine(name, tmp_path)
    assert str(raised.value) == f"unknown I/O engine {name!r}; {hint}"


def test_a_missing_aiofiles_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "aiofiles", None)
    with pytest.raises(ConfigError, match=r"pip install 'offload\[aio\]'"):
        check_engine("aiofiles")


def test_a_missing_deepspeed_names_the_command(monkeypatch):
    monkeypatch.setattr(deepspeed.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'offload\[deepspeed\]'"):
        check_engine("deepspeed")


def test_deepspeed_needs_direct_io(tmp_path):
    with (tmp_path / "data").open("w+b") as file, pytest.raises(ConfigError, match="O_DIRECT"):
        deepspeed.DeepspeedEngine(OpenFile(file.fileno(), None))


def test_an_operator_that_was_never_built_names_the_command(tmp_path):
    with pytest.raises(ConfigError, match=r"AsyncIOBuilder as B; B\(\).load\(\)") as raised:
        deepspeed._check_built(tmp_path)
    assert f"pin_memory.so in {tmp_path / 'pin_memory'}" in str(raised.value)


def test_a_lock_of_a_killed_build_is_named_instead_of_waited_for(tmp_path):
    for name in ("pin_memory", "async_io"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.so").touch()
    deepspeed._check_built(tmp_path)
    lock = tmp_path / "async_io" / "lock"
    lock.touch()
    with pytest.raises(ConfigError, match=f"remove {lock}"):
        deepspeed._check_built(tmp_path)


def test_memory_that_can_not_be_locked_is_found_out_before_deepspeed_aborts(monkeypatch):
    class Refusing:
        def mlock(self, *_):
            ctypes.set_errno(12)
            return -1

    monkeypatch.setattr(deepspeed, "_libc", Refusing())
    with pytest.raises(OSError, match=r"can't lock 4.00 MiB .*ulimit -l") as raised:
        deepspeed._check_lockable(4 << 20)
    assert raised.value.errno == 12


class Driver:
    """A CUDA driver that finds ``devices``, or fails with ``code``."""

    def __init__(self, devices=0, code=0):
        self.devices, self.code = devices, code

    def cuInit(self, _flags):  # noqa: N802
        return self.code

    def cuDeviceGetCount(self, count):  # noqa: N802
        count._obj.value = self.devices
        return 0


def test_kvikio_without_a_driver_says_that_the_driver_is_missing(monkeypatch):
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass  # this machine has none: no need to pretend
    else:

        def absent(name):
            raise OSError(f"{name}: cannot open shared object file")

        monkeypatch.setattr(kvikio.ctypes, "CDLL", absent)
    with pytest.raises(ConfigError, match=r"NVIDIA driver, which this machine lacks \(libcuda"):
        check_engine("kvikio")


@pytest.mark.parametrize(
    ("driver", "said"),
    [
        (Driver(devices=0), "CUDA error 0, 0 devices"),
        (Driver(code=100), "CUDA error 100, 0 devices"),
    ],
)
def test_kvikio_without_a_device_says_so(monkeypatch, driver, said):
    monkeypatch.setattr(kvikio.ctypes, "CDLL", lambda _: driver)
    with pytest.raises(ConfigError, match=said):
        check_engine("kvikio")


def test_a_missing_kvikio_names_the_command(monkeypatch):
    monkeypatch.setattr(kvikio.ctypes, "CDLL", lambda _: Driver(devices=1))
    monkeypatch.setitem(sys.modules, "kvikio", None)
    with pytest.raises(ConfigError, match=r"pip install 'offload\[gds\]'"):
        check_engine("kvikio")


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("POSIX error at: file.cpp:70: No space left on device", 28),
        ("KvikIO failure: EFBIG (File too large)", 27),
        ("something else", 5),
    ],
)
def test_the_number_of_an_error_is_found_in_kvikio_s_message(message, code):
    assert kvikio._errno_of(RuntimeError(message)) == code


def test_kvikio_reads_and_writes_past_the_page_cache():
    wanted = {"auto_direct_io_read": True, "auto_direct_io_write": True}

    class Defaults:
        def __init__(self, **known):
            self.known = known

        def set(self, name, value):
            if name not in self.known:
                raise KeyError(name)
            self.known[name] = value

    for known in (dict.fromkeys(wanted, False), {"auto_direct_io_read": False}, {}):
        defaults = Defaults(**known)
        kvikio._avoid_page_cache(defaults)
        assert defaults.known == {name: wanted[name] for name in known}
    kvikio._avoid_page_cache(object())  # older still


def test_every_error_of_a_missing_part_offers_the_engine_that_always_works(monkeypatch):
    monkeypatch.setitem(sys.modules, "aiofiles", None)
    monkeypatch.setattr(deepspeed.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(kvikio.ctypes, "CDLL", lambda _: Driver())
    for name in set(ENGINES) - {"threads"}:
        with pytest.raises(ConfigError, match="choose io_engine=threads"):
            check_engine(name)


# Wrapping.


def test_engines_chosen_meanwhile_are_wrapped_and_later_ones_are_not(tmp_path):
    requests = []
    with wrapping(lambda engine: RecordingEngine(engine, requests)):
        factory = choose_engine("threads", tmp_path).factory
    with TierFile(tmp_path, None, factory) as file, Memory.of(pattern(PAGE)) as memory:
        file.write(0, memory.address, PAGE)
    assert [(request.verb, request.offset, request.nbytes) for request in requests] == [
        ("write", 0, PAGE)
    ]
    with TierFile(tmp_path, None, choose_engine("threads", tmp_path).factory) as file:
        assert file.engine.name == "threads"


def test_wrappers_nest_the_outer_one_outside(tmp_path):
    link = Link(bytes_per_s=1e9)
    with (
        wrapping(lambda engine: RecordingEngine(engine, [])),
        wrapping(lambda engine: ThrottledEngine(engine, link)),
    ):
        factory = choose_engine("threads", tmp_path).factory
    with TierFile(tmp_path, None, factory) as file:
        names = (file.engine.name, file.engine.inner.name, file.engine.inner.inner.name)
        assert names == ("recording", "throttled", "threads")


def test_a_run_tells_which_engine_it_took_and_why(tmp_path):
    import torch

    model = torch.nn.Linear(8, 8)
    config = {"io_engine": "aiofiles"}
    with offload.attach(model, budget="8GiB", nvme=tmp_path, config=config) as engine:
        assert "I/O engine: aiofiles: asked for; by direct I/O" in engine.notices
        assert engine._runtime.store.tier.file.engine.name == "aiofiles"
        assert engine._runtime.gradient_scratch.file.engine.name == "aiofiles"
    with offload.attach(model, budget="8GiB", nvme=tmp_path) as engine:
        assert not any("I/O engine" in notice for notice in engine.notices)


def test_a_model_built_with_another_engine_is_refused(tmp_path):
    import torch

    with offload.init(budget="8GiB", nvme=tmp_path):
        model = torch.nn.Linear(300, 300)
    with pytest.raises(ConfigError, match="io_engine=aiofiles differs from the auto"):
        offload.attach(model, config={"io_engine": "aiofiles"})


def test_choosing_imports_no_library():
    import subprocess

    code = (
        "import sys, offload.config\n"
        "heavy = {'torch', 'numpy', 'aiofiles', 'deepspeed', 'kvikio'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
