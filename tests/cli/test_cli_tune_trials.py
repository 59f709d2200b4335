"""A trial of ``offload tune``: how it ends, what that tells, and what is left of it."""

from pathlib import Path

import pytest
from tune_verb import write_script

from offload.config import make_config
from offload.swap.plan import fits_in_no_case, named_nbytes
from offload.tuning.candidates import BASELINE, Candidate
from offload.tuning.folders import trial_folders
from offload.tuning.search import Trial
from offload.tuning.trials import Trials


def trials(
    script: Path, nvme: Path, folder: Path, *words: str, steps: int = 3, budget: str = "8GiB"
) -> Trials:
    base = make_config({}, budget=budget, nvme=str(nvme))
    return Trials([str(script), *words], base, steps=steps, folders={nvme: folder})


def test_a_trial_ends_behind_its_last_step_and_takes_its_helpers_along(
    tmp_path: Path, nvme: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper = "import subprocess as s; pid = s.Popen(['sleep', '999']).pid if step == 2 else 0; "
    helper += "(here / 'helper').write_text(str(pid))"
    script = write_script(tmp_path / "job", helper)
    monkeypatch.setenv("OFFLOAD_NVME", str(tmp_path / "mine"))  # the user's own store
    with trial_folders([nvme]) as folders:
        monkeypatch.delenv("OFFLOAD_NVME")
        run = trials(script, nvme, folders[nvme], "100")
        monkeypatch.setenv("OFFLOAD_NVME", str(tmp_path / "mine"))
        trial = run(BASELINE, None)
        left = sorted(path.name for path in folders[nvme].iterdir())
    assert (trial.status, trial.steps) == ("done", 3)
    assert left == ["lock", "settings.json", "stderr", "stdout"]
    assert sorted(path.name for path in script.parent.iterdir()) == ["helper", "train.py"]
    pid = int((script.parent / "helper").read_text())
    status = Path(f"/proc/{pid}/stat")
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    ("behind_backward", "limit_s", "status", "reason"),
    [
        ("import os; os.kill(os.getpid(), 9)", None, "failed", "killed by SIGKILL: out of memory?"),
        ("import time; time.sleep(1000)", 0.0, "too slow", "not done after 0 s, 0 of 3 steps"),
        ("print('why', file=sys.stderr); sys.exit(7)", None, "failed", "why"),
    ],
)
def test_how_a_trial_may_end(
    behind_backward: str, limit_s: float | None, status: str, reason: str,
    tmp_path: Path, nvme: Path,
) -> None:  # fmt: skip
    script = write_script(tmp_path / "job", behind_backward)
    with trial_folders([nvme]) as folders:
        trial = trials(script, nvme, folders[nvme], "5")(BASELINE, limit_s)
    assert (trial.status, trial.reason) == (status, reason)


def test_what_fits_with_no_settings_is_told_apart(tmp_path: Path, nvme: Path) -> None:
    in_backward = Candidate(name="b", factor="b", changes={"step_in_backward": True})
    script = write_script(tmp_path / "job")
    with trial_folders([nvme]) as folders:

        def tried(candidate: Candidate, mib: int) -> Trial:
            return trials(script, nvme, folders[nvme], "5", budget=f"{mib}MiB")(candidate, None)

        never = tried(BASELINE, 60)
        named = named_nbytes(never.reason)
        assert named is not None
        # Little is missing, which other settings might take less; or what these alone take.
        little = tried(BASELINE, (named >> 20) - 16)
        other = tried(in_backward, 60)
    assert [one.status for one in (never, little, other)] == [
        "never fits",
        "does not fit",
        "does not fit",
    ]


@pytest.mark.parametrize(("missing_mib", "hopeless"), [(0, False), (60, False), (70, True)])
def test_what_no_setting_fits_is_far_from_what_is_named(missing_mib: int, hopeless: bool) -> None:
    assert fits_in_no_case(500 << 20, (500 - missing_mib) << 20) == hopeless
