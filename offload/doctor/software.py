"""Versions, and the optional libraries with the reason why one can't be used."""

import ctypes
import importlib.metadata
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import offload
from offload.doctor.finding import Finding
from offload.tiers.gpus import Gpu


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What is asked of the Python environment; tests answer themselves."""

    version: Callable[[str], str | None]
    has_library: Callable[[str], bool]
    has_program: Callable[[str], bool]


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def can_load(library: str) -> bool:
    """Whether the dynamic linker finds a shared library."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def environment() -> Environment:
    """The real one."""
    return Environment(
        version=installed_version,
        has_library=can_load,
        has_program=lambda name: shutil.which(name) is not None,
    )


def examine_software(env: Environment, gpus: tuple[Gpu, ...]) -> tuple[Finding, ...]:
    """Versions and optional libraries."""
    return (versions(), torch(env, gpus), deepspeed(env), kvikio(env), aiofiles(env))


def versions() -> Finding:
    """Offload and Python."""
    return Finding(
        subject="Offload", value=f"{offload.__version__}, Python {platform.python_version()}"
    )


def torch(env: Environment, gpus: tuple[Gpu, ...]) -> Finding:
    """PyTorch; a build for the CPU leaves a GPU unused."""
    version = env.version("torch")
    if version is None:
        return Finding(
            subject="PyTorch",
            value="not installed",
            status="fail",
            detail="Offload can't train without it",
            mend="pip install torch",
        )
    unused = bool(gpus) and version.endswith("+cpu")
    return Finding(
        subject="PyTorch",
        value=version,
        status="warn" if unused else "ok",
        detail="a build for the CPU: it can't use the GPU" if unused else "",
        mend="pip install --force-reinstall torch" if unused else "",
    )


def _library(env: Environment, name: str, *, extra: str, what: str, missing: str) -> Finding:
    """An optional library: absent is a fact, present but unusable a warning."""
    version = env.version(name)
    if version is None:
        return Finding(
            subject=name,
            value="not installed",
            detail=f"optional: {what}; pip install 'offload[{extra}]'",
        )
    return Finding(
        subject=name,
        value=f"{version}, {'not usable' if missing else 'usable'}",
        status="warn" if missing else "ok",
        detail=missing or what,
    )


def deepspeed(env: Environment) -> Finding:
    """DeepSpeed's engine compiles itself at its first use."""
    lacks = [name for name in ("g++", "ninja") if not env.has_program(name)]
    lacks += ["libaio.so.1"] if not env.has_library("libaio.so.1") else []
    return _library(
        env,
        "deepspeed",
        extra="deepspeed",
        what="its asynchronous I/O as a file engine",
        missing=f"its I/O library can't be built: {', '.join(lacks)} missing" if lacks else "",
    )


def kvikio(env: Environment) -> Finding:
    """KvikIO asks the CUDA driver about every buffer, host memory included."""
    name = next((name for name in ("kvikio-cu13", "kvikio-cu12") if env.version(name)), None)
    driver = env.has_library("libcuda.so.1")
    return _library(
        env,
        name or "kvikio-cu13",
        extra="gds",
        what="GPUDirect Storage",
        missing="" if driver else "it needs the CUDA driver: libcuda.so.1 is missing",
    )


def aiofiles(env: Environment) -> Finding:
    """Portable I/O for file systems without O_DIRECT."""
    return _library(env, "aiofiles", extra="aio", what="portable file I/O", missing="")
