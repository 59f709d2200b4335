"""Records on disk: what is no event, a disk that is full, and a run that was killed."""

import errno
import json
from pathlib import Path

import pytest

from offload.tiers.events import JsonlRecorder, Notice, StepFinished, from_json, to_json

NOTICE = Notice(t_s=1.0, subject="x", message="y")
STEP = StepFinished(
    t_s=1, step=1, step_s=1.0, compute_s=1.0, stall_s=0.0, optimizer_s=0.0, commit_s=0.0,
    read_nbytes=1, written_nbytes=1, peak_nbytes=1, resident_nbytes={"weight": 1},
)  # fmt: skip


@pytest.mark.parametrize("event", [NOTICE, STEP])
def test_events_are_read_as_they_were_written(event):
    assert from_json(to_json(event)) == event


@pytest.mark.parametrize(
    "line", ["", "{", "[1]", '"x"', "{}", '{"kind": "None"}', '{"kind": []}', '{"kind": "Notice"}']
)
def test_what_is_no_event_is_refused(line):
    with pytest.raises(ValueError, match=r"."):
        from_json(line)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("t_s", "1"),
        ("t_s", float("nan")),
        ("step_s", float("inf")),
        ("step", 1.5),
        ("bucket", 3),
        ("resident_nbytes", []),
        ("resident_nbytes", {"weight": "1"}),
        ("steps", 1),
    ],
)
def test_what_no_event_has_is_told(name, value):
    line = json.dumps(json.loads(to_json(STEP)) | {name: value})
    with pytest.raises(ValueError, match=f"StepFinished can't have {name}="):
        from_json(line)


def test_a_full_disk_ends_the_record_and_not_the_run():
    recorder = JsonlRecorder(Path("/dev/full"))
    assert recorder.failure is None
    recorder.record(NOTICE)
    recorder.flush()
    assert recorder.failure.errno == errno.ENOSPC
    recorder.record(NOTICE)
    recorder.flush()
    recorder.close()


@pytest.mark.parametrize("cut", ["", '{"kind": "Noti', "{"])
@pytest.mark.parametrize("before", [0, 2])
def test_a_record_goes_on_behind_its_last_whole_line(tmp_path, before, cut):
    file = tmp_path / "rank0.jsonl"
    whole = before * f"{to_json(NOTICE)}\n"
    file.write_text(whole + cut)
    recorder = JsonlRecorder(file)
    recorder.record(STEP)
    recorder.close()
    assert file.read_text() == f"{whole}{to_json(STEP)}\n"
