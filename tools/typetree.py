"""Link ``build/typetree/offload`` so that static tools see the packages as an import does.

    python tools/typetree.py        # then run mypy or lint-imports in build/typetree

The mapping is read from ``[tool.setuptools.package-dir]`` of pyproject.toml.
"""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build(root: Path) -> Path:
    """Bring the type tree of the checkout ``root`` up to date; returns the tree's path."""
    setuptools = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    wanted = {entry.name: entry for entry in (root / "offload").iterdir()}
    wanted |= {
        name.removeprefix("offload."): root / folder
        for name, folder in setuptools["package-dir"].items()
    }
    tree = root / "build" / "typetree"
    package = tree / "offload"
    package.mkdir(parents=True, exist_ok=True)
    for link in package.iterdir():
        if wanted.get(link.name) != link.readlink():
            link.unlink()
    for name, target in wanted.items():
        if not (package / name).is_symlink():
            (package / name).symlink_to(target)
    return tree


if __name__ == "__main__":
    print(build(ROOT))
