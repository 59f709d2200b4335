"""What the tests of the doctor and of facts share: systems made of files, tools that answer."""

from pathlib import Path

from offload.doctor.finding import Finding
from offload.tiers.system import System, ToolAnswer

GIB = 1 << 30


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def made(tmp_path: Path, proc: dict[str, str] | None = None, sys: dict[str, str] | None = None):
    write(tmp_path / "proc", proc or {})
    write(tmp_path / "sys", sys or {})
    return System(proc=tmp_path / "proc", sys=tmp_path / "sys", run=lambda _: None)


def tools(**answers: str):
    """A machine on which these tools give these answers."""
    return lambda command: (
        ToolAnswer(code=0, text=answers[command[0]]) if command[0] in answers else None
    )


def lines(findings: tuple[Finding, ...]) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}
