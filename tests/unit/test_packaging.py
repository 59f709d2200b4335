"""One import package over several folders: complete, lazy, and out of the user's way."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import offload

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
FOLDERS = {"offload": "offload", **SETUPTOOLS["package-dir"]}


def python(code, cwd, *args):
    """What ``code`` prints as JSON when a fresh interpreter runs it in ``cwd``."""
    done = subprocess.run(
        [sys.executable, "-c", code, *args], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def packages_on_disk():
    for package, folder in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            yield ".".join([package, *init.parent.relative_to(ROOT / folder).parts])


def test_every_package_on_disk_is_listed():
    assert sorted(SETUPTOOLS["packages"]) == sorted(packages_on_disk())


def test_every_folder_with_code_is_a_package():
    for folder in FOLDERS.values():
        for module in (ROOT / folder).rglob("*.py"):
            assert (module.parent / "__init__.py").exists(), module


def test_version_is_told_once():
    assert offload.__version__ == PYPROJECT["project"]["version"]
    assert importlib.metadata.version("offload") == offload.__version__


def test_wheel_holds_the_whole_house_under_one_name(tmp_path):
    tree, wheels = tmp_path / "tree", tmp_path / "wheels"
    tree.mkdir()
    wheels.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import contextlib, json, sys\n"
        "from setuptools import build_meta\n"
        "with contextlib.redirect_stdout(sys.stderr):\n"
        "    name = build_meta.build_wheel(sys.argv[1])\n"
        "print(json.dumps(name))\n"
    )
    with zipfile.ZipFile(wheels / python(code, tree, str(wheels))) as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {
        "/".join([*package.split("."), *path.relative_to(ROOT / folder).parts])
        for package, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".yaml"} or path.name == "py.typed"
    }
    assert packed == expected


def test_import_is_lazy(tmp_path):
    code = (
        "import json, sys\n"
        "import offload, offload.errors\n"
        "slow = ('torch', 'numpy', 'transformers', 'pydantic', 'rich')\n"
        "print(json.dumps([name for name in slow if name in sys.modules]))\n"
    )
    assert python(code, tmp_path) == []


def test_command_line_is_lazy(tmp_path):
    code = (
        "import json, sys\n"
        "import offload.cli\n"
        "print(json.dumps([name for name in ('torch', 'transformers') if name in sys.modules]))\n"
    )
    assert python(code, tmp_path) == []


def test_entry_point_is_the_command_line():
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="offload")
    assert command.value == "offload.cli:main"
    assert callable(command.load())


@pytest.mark.parametrize("name", offload.__all__)
def test_public_name_resolves(name):
    assert getattr(offload, name) is getattr(offload, name)
    assert name in dir(offload)


def test_public_names_come_from_where_they_are_defined():
    assert offload.attach.__module__ == "offload.attaching"
    assert offload.Engine.__module__ == "offload.engine"
    assert offload.OffloadConfig.__module__ == "offload.config"


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"^module 'offload' has no attribute 'atach'$"):
        _ = offload.atach


@pytest.mark.parametrize("name", sorted(set(SETUPTOOLS["package-dir"].values())))
def test_users_module_of_the_same_name_stays_the_users(tmp_path, name):
    (tmp_path / f"{name}.py").write_text("OWNER = 'user'\n", "utf-8")
    script = tmp_path / "train.py"
    script.write_text(
        f"import offload.{name}, {name}\nprint({name}.OWNER, offload.{name}.__name__)\n", "utf-8"
    )
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"user offload.{name}\n"), done.stderr


@pytest.mark.parametrize(("users", "offsets"), [(None, [0, 0]), ("0", [64, 64])])
def test_tensors_are_page_aligned_for_direct_io(tmp_path, monkeypatch, users, offsets):
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    if users is not None:
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", users)
    code = (
        "import json, mmap, offload, torch\n"
        "tensors = [torch.empty(nbytes, dtype=torch.uint8) for nbytes in (2 << 20, 64 << 20)]\n"
        "print(json.dumps([tensor.data_ptr() % mmap.PAGESIZE for tensor in tensors]))\n"
    )
    assert python(code, tmp_path) == offsets
