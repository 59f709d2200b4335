"""The quickstart's parts: children, caches, and the whole of it on a tiny model."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from offload.recipes import quickstart
from offload.recipes.children import ChildError, run_child


def script(tmp_path: Path, text: str) -> Path:
    """A Python script of this text."""
    file = tmp_path / "script.py"
    file.write_text(text)
    return file


def test_a_childs_peak_is_its_own(tmp_path: Path) -> None:
    child = script(tmp_path, "import sys; data = b'x' * int(sys.argv[1])")
    # In a process of its own: a child's peak is never below what its parent held at the fork.
    measure = (
        "from offload.recipes.children import run_child\n"
        f"child = run_child([{str(child)!r}, NBYTES])\n"
        "print(child.peak_nbytes)"
    )
    small, large = (
        int(subprocess.check_output([sys.executable, "-c", measure.replace("NBYTES", repr(n))]))
        for n in ("1", str(200 << 20))
    )
    assert 190 << 20 < large - small < 210 << 20


def test_a_childs_output_is_kept_from_ours(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = "import sys; print('result'); print('progress', file=sys.stderr)"
    assert run_child([script(tmp_path, text)]).stdout == "result\n"
    assert capfd.readouterr() == ("", "progress\n")


def test_a_childs_failure_keeps_its_code(tmp_path: Path) -> None:
    with pytest.raises(ChildError, match=r"script.py failed") as caught:
        run_child([script(tmp_path, "raise SystemExit(3)")])
    assert caught.value.exit_code == 3


def test_a_killed_child_is_named_by_its_signal(tmp_path: Path) -> None:
    text = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(ChildError, match="SIGKILL") as caught:
        run_child([script(tmp_path, text)])
    assert caught.value.exit_code == 128 + signal.SIGKILL


def test_ctrl_c_reaches_the_child_once_and_is_waited_for(tmp_path: Path) -> None:
    text = """if True:
        import os, pathlib, signal
        try:
            os.kill(os.getppid(), signal.SIGINT)
            signal.pause()
        except KeyboardInterrupt:
            pathlib.Path(__file__).with_name("cleaned").touch()
            raise SystemExit(130)
    """
    with pytest.raises(ChildError) as caught:
        run_child([script(tmp_path, text)])
    assert caught.value.exit_code == 130
    assert (tmp_path / "cleaned").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    child = script(tmp_path, f"import os, signal; os.write({writing}, b'x'); signal.pause()")
    parent = (
        "import subprocess, sys\n"
        "from offload.recipes import children\n"
        "plain = subprocess.Popen\n"
        f"keep = lambda *a, **k: plain(*a, **k, pass_fds=({writing},))\n"
        "subprocess.Popen = keep\n"
        f"children.run_child([{str(child)!r}])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], pass_fds=(writing,))
    os.close(writing)
    assert os.read(reading, 1) == b"x"
    process.kill()
    process.wait()
    assert os.read(reading, 1) == b""  # the end: nobody holds the other side any more
    os.close(reading)


def test_key_depends_on_its_parts() -> None:
    assert quickstart.key_of("a", ["b"]) == quickstart.key_of("a", ["b"])
    assert quickstart.key_of("a", ["b"]) != quickstart.key_of("a", ["c"])


def test_unreadable_json_counts_as_absent(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    assert quickstart.read_json(file) == {}
    file.write_text('{"key": ')
    assert quickstart.read_json(file) == {}
    quickstart.write_json(file, {"key": 1})
    assert quickstart.read_json(file) == {"key": 1}


def quick(runs: Path) -> tuple[dict[str, float], str]:
    """Run the quickstart on a tiny model, in a process of its own; its result and its stdout."""
    command = [sys.executable, quickstart.__file__, "--quick", f"--runs={runs}"]
    out = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, cwd=runs).stdout
    return json.loads((runs / "quickstart" / "result.json").read_text()), out


@pytest.mark.slow
@pytest.mark.usefixtures("several_threads")
def test_quick_run_twice_is_idempotent(tmp_path: Path) -> None:
    first, out = quick(tmp_path)
    place = tmp_path / "quickstart"
    assert tuple(first) == quickstart.RESULT_KEYS
    assert first["peak_bytes"] <= first["budget_bytes"]
    assert first["loss_after"] < first["loss_before"]
    assert f"offload report {place / 'record'}" in out

    made = (place / "checkpoint" / "model.safetensors").stat().st_mtime_ns
    again, _ = quick(tmp_path)
    assert (place / "checkpoint" / "model.safetensors").stat().st_mtime_ns == made
    for name in ("plain_peak_bytes", "budget_bytes", "loss_before", "loss_after", "heldout_after"):
        assert again[name] == first[name], name
