"""What is wrong with the directories that a user names, told before anything is made in them."""

from pathlib import Path

import pytest

from offload.allocator.errors import ConfigError
from offload.tiers import directories as directories_module
from offload.tiers.directories import check_directories, file_system_of

MOUNTS = r"""
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:26 / /data\040one rw,relatime - xfs /dev/nvme0n1 rw
31 22 0:27 / /data rw,relatime shared:2 master:1 - nfs4 server:/export rw,vers=4.2
32 31 259:1 / /data/fast rw,relatime - ext4 /dev/nvme1n1 rw
33 32 0:28 / /data/fast rw,relatime - fuse.sshfs me@host: rw
""".strip()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/home/me", "ext4"),
        ("/data", "nfs4"),
        ("/data/runs", "nfs4"),
        ("/database", "ext4"),
        ("/data one/x", "xfs"),
        ("/data/fast/x", "fuse.sshfs"),  # mounted over the other
    ],
)
def test_a_path_is_on_its_nearest_mount(path, kind):
    assert file_system_of(Path(path), MOUNTS) == kind


def test_without_any_mount_nothing_is_known():
    assert file_system_of(Path("/x"), "") is None


def test_a_network_mount_is_told(tmp_path, monkeypatch):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"1 0 0:5 / {tmp_path} rw - nfs4 server:/export rw\n")
    monkeypatch.setattr(directories_module, "_MOUNTS", mounts)
    ((path, message),) = check_directories([tmp_path / "store"])
    assert path == tmp_path / "store"
    assert message.startswith("is on nfs4, a network mount")


@pytest.mark.parametrize("inside", ["", "store", "deep/store"])
def test_a_symbolic_link_in_the_path_is_refused(tmp_path, inside):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(ConfigError) as raised:
        check_directories([tmp_path / "link" / inside])
    assert f"symbolic link {tmp_path / 'link'}" in str(raised.value)
    assert f"pass {tmp_path / 'real' / inside}" in str(raised.value)
    assert not list((tmp_path / "real").iterdir())  # nothing was made


def test_a_link_that_leads_nowhere_is_refused_too(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "missing")
    with pytest.raises(ConfigError, match="symbolic link"):
        check_directories([tmp_path / "link"])


def test_a_directory_that_is_given_twice_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"a/\.\./a is given twice"):
        check_directories([tmp_path / "a", tmp_path / "b", tmp_path / "a" / ".." / "a"])


def test_every_problem_is_told_at_once(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ConfigError) as raised:
        check_directories([tmp_path / "link", tmp_path / "a", tmp_path / "a"])
    assert len(raised.value.problems) == 2


def test_two_directories_on_one_file_system_gain_nothing(tmp_path):
    first, second = tmp_path / "not-yet" / "a", tmp_path / "b"
    ((path, message),) = check_directories([first, second])
    assert path == second
    assert message.startswith(f"is on the same file system as {first}: striping over both gains no")
    assert check_directories([first, Path("/dev/shm")]) == []
    assert check_directories([second]) == []


def test_a_relative_directory_is_fine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_directories([Path("runs/store")]) == []
