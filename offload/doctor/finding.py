"""What the doctor finds: one frozen line for each fact."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

Status: TypeAlias = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One fact about the machine.

    Attributes:
        subject: what it is about.
        value: the fact, in a few words.
        status: ``ok``, ``warn`` (works, at a cost that ``detail`` tells) or ``fail``.
        detail: what it means here; may be empty.
        mend: the command that mends it; empty where there is none, or nothing to mend.
    """

    subject: str
    value: str
    status: Status = "ok"
    detail: str = ""
    mend: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Findings under one heading."""

    title: str
    findings: tuple[Finding, ...]
