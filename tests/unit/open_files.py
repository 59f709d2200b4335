"""Which files of a directory the process holds open, the unlinked ones among them."""

from pathlib import Path


def open_files(directory: Path) -> list[str]:
    """The open files under ``directory``. Other descriptors come and go with the process's
    libraries, so that their number says nothing about the code under test.
    """
    links = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            target = descriptor.readlink()
        except FileNotFoundError:  # the descriptor of this listing itself
            continue
        if target.is_relative_to(directory):
            links.append(str(target))
    return links
