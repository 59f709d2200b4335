"""A placement as text for a terminal of 80 columns, and for JSON."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from offload.allocator.units import format_nbytes, format_seconds
from offload.planner.as_attached import StepSetting
from offload.planner.on_device import PlacementAnswer
from offload.planner.text import FORMAT_VERSION, WIDTH
from offload.swap.planning.placing.choices import REBUILD
from offload.swap.planning.placing.placement import Placement, TierUse
from offload.swap.planning.placing.work import Role, Work

_ROLES: tuple[tuple[Role, str], ...] = (
    ("frozen", "frozen weights"),
    ("weights", "weights"),
    ("gradients", "gradients"),
    ("states", "optimizer states"),
    ("saved", "activations"),
)
_WORTH_TELLING = 5e-4  # of a class


def print_placement(
    answer: PlacementAnswer, *, explain: bool, console: Console | None = None
) -> None:
    """Print where everything goes, how long a step takes, what binds it and what to change."""
    console = console or Console(width=WIDTH, highlight=False)
    placement = answer.placement
    console.print(answer.title, style="bold", markup=False)
    console.print(answer.machine_name, markup=False)
    console.print(_table(answer))
    phases = " + ".join(
        f"{phase.name} {format_seconds(phase.seconds)}" for phase in placement.phases
    )
    console.print(
        f"step         {format_seconds(placement.step_s)}, {answer.tokens_per_s:,.0f} tokens/s = "
        f"{phases} + exposed {format_seconds(placement.exposed_s)}",
        markup=False,
    )
    bounds = " · ".join(f"{phase.name}: {phase.bound_by}" for phase in placement.phases)
    console.print(f"bound by     {bounds}", markup=False)
    console.print(
        f"batch        {placement.passes} micro-batch{'es' if placement.passes > 1 else ''}; "
        f"weights of {placement.window_blocks} stage{'s' if placement.ahead else ''} visit the "
        "device at once",
        markup=False,
    )
    if answer.solved is not None:
        console.print(f"solved       {answer.solved}", markup=False)
    for line in _setting_lines(answer.setting):
        console.print(line, markup=False)
    for advice in answer.advice:
        console.print(
            f"try          {advice.change}: {format_seconds(advice.step_s)} a step", markup=False
        )
    if explain:
        for line in explain_placement(answer):
            console.print(f"why          {line}", markup=False)


def _setting_lines(setting: StepSetting | None) -> Iterator[str]:
    """What ``attach`` makes of it, and what to set for that."""
    if setting is None:
        return
    yield (
        f"today        {format_seconds(setting.host_s)}: by default attach steps on the host and "
        "rebuilds nothing"
    )
    yield f"set          {setting.told}"


def _table(answer: PlacementAnswer) -> Table:
    tiers = [use.tier for use in answer.placement.uses]
    table = Table(width=WIDTH)
    table.add_column("")
    for tier in tiers:
        table.add_column("drive" if tier.startswith("file:") else tier, justify="right")
    table.add_column("")
    for row in placement_rows(answer):
        cells = [format_nbytes(row["nbytes"][tier]) for tier in tiers]
        table.add_row(row["name"], *cells, row["how"])
    return table


def placement_rows(answer: PlacementAnswer) -> list[dict[str, Any]]:
    """Each class, its home bytes by tier, and how it is kept; then peaks and budgets."""
    placement, work = answer.placement, answer.work
    tiers = [use.tier for use in placement.uses]
    rows: list[dict[str, Any]] = []
    for role, name in _ROLES:
        if any(one.role == role for one in placement.classes):
            nbytes = {tier: _held(placement, work, role, tier) for tier in tiers}
            rows.append({"name": name, "nbytes": nbytes, "how": _how(answer, role)})
    peaks = {use.tier: use.peak_nbytes for use in placement.uses}
    rows.append({"name": "peak", "nbytes": peaks, "how": "with all that visits"})
    budgets = {use.tier: use.budget_nbytes for use in placement.uses}
    rows.append({"name": "budget", "nbytes": budgets, "how": ""})
    return rows


def _held(placement: Placement, work: Work, role: Role, tier: str) -> int:
    """The store has slots of weights and states, wherever else they are."""
    if tier != work.store or role not in {"frozen", "weights", "states"}:
        return placement.nbytes(role, tier)
    slots = 1 if role == "frozen" else work.slots
    return slots * sum(one.blocks * one.nbytes for one in placement.classes if one.role == role)


def _how(answer: PlacementAnswer, role: Role) -> str:
    placement = answer.placement
    total = sum(one.blocks * one.nbytes for one in placement.classes if one.role == role)
    if role == "saved":
        rebuilt = placement.nbytes(role, REBUILD) / total
        return f"{rebuilt:.0%} rebuilt" if rebuilt > _WORTH_TELLING else ""
    if role == "states":
        stepped = sum(
            one.blocks * one.nbytes * share.fraction
            for one in placement.classes
            for share in one.shares
            if one.role == role and share.stepper == "device"
        )
        return ", ".join([f"device steps {stepped / total:.0%}", *_forms(answer)])
    return ""


def _forms(answer: PlacementAnswer) -> list[str]:
    """Of what the optimizer keeps, where it is not as it computes with it."""
    states, masters = answer.state_precision, answer.master_weights
    return [*([states] if states != "exact" else []), *(["masters"] if masters != "none" else [])]


def explain_placement(answer: PlacementAnswer) -> Iterator[str]:
    """Why each class of bytes went where it did."""
    placement = answer.placement
    for role, name in _ROLES:
        total = sum(one.blocks * one.nbytes for one in placement.classes if one.role == role)
        if total:
            parts = [
                f"{_place(where)} {placement.nbytes(role, where) / total:.0%}"
                for where in (*(use.tier for use in placement.uses), REBUILD)
                if placement.nbytes(role, where) > _WORTH_TELLING * total
            ]
            yield f"{name}: {', '.join(parts)}; {_reason(placement, role, total)}"
    yield from _recoded(answer)
    prices = {price.tier: price.s_per_gib for price in placement.prices}
    for use in placement.uses:
        yield _use_line(use, prices.get(use.tier, 0.0))
    for phase in placement.phases:
        lanes = sorted(phase.lanes.items(), key=lambda lane: -lane[1])[:3]
        busy = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in lanes)
        yield f"{phase.name}: {format_seconds(phase.seconds)}, as long as {phase.bound_by} ({busy})"


def _recoded(answer: PlacementAnswer) -> Iterator[str]:
    """What the optimizer computes with, where the store has another form."""
    work, sizes = answer.work, dict.fromkeys(("kept", "stepped"), 0)
    recoded = [kind for kind in (work.kinds[at] for at in work.order) if kind.recoded is not None]
    for kind in recoded:
        sizes["kept"] += kind.trained_nbytes + kind.states_nbytes
        sizes["stepped"] += kind.stepped_nbytes("weights") + kind.stepped_nbytes("states")
    if recoded:
        seconds = sum(kind.recoded.seconds for kind in recoded if kind.recoded is not None)
        yield (
            f"precision: {' and '.join(_forms(answer))}: weights and states of "
            f"{format_nbytes(sizes['kept'])} become {format_nbytes(sizes['stepped'])} in host "
            f"memory, whoever steps them; changing their form takes {format_seconds(seconds)}"
        )


def _place(where: str) -> str:
    return "rebuilt" if where == REBUILD else where


def _reason(placement: Placement, role: Role, total: int) -> str:
    device = placement.uses[0]
    if placement.nbytes(role, device.tier) >= total * (1 - _WORTH_TELLING):
        return f"all of it fits on {device.tier}"
    prices = {price.tier: price.s_per_gib for price in placement.prices}
    scarce = [use.tier for use in placement.uses if prices.get(use.tier, 0.0) > 0]
    away = {
        "frozen": "each byte elsewhere is fetched in forward and in backward",
        "weights": "each byte elsewhere is fetched twice a pass, and stepped where it is",
        "gradients": "they leave as backward makes them, and are read once, by the step",
        "states": "only the step touches them: read once, written once",
        "saved": "what leaves crosses the link out and back, what is rebuilt costs compute",
    }[role]
    if scarce:
        return f"{away}; {' and '.join(scarce)} would save time with more bytes"
    return f"{away}; that hides behind {placement.bound_by}"


def _use_line(use: TierUse, s_per_gib: float) -> str:
    line = (
        f"{use.tier}: {format_nbytes(use.peak_nbytes)} of {format_nbytes(use.budget_nbytes)}, most "
        f"in the {use.moment.removeprefix('the ')}"
    )
    if s_per_gib > 0:
        return f"{line}; the next GiB saves {format_seconds(s_per_gib)} a step"
    return f"{line}; more of it saves nothing"


def placement_document(answer: PlacementAnswer) -> dict[str, Any]:
    """The same figures for JSON; sizes in bytes, times in seconds."""
    return {
        "title": answer.title,
        "machine": answer.machine_name,
        "step_s": answer.placement.step_s,
        "tokens_per_s": answer.tokens_per_s,
        "bound_by": answer.placement.bound_by,
        "today_s": None if answer.setting is None else answer.setting.host_s,
        "optimizer_device": None if answer.setting is None else answer.setting.value,
        "attached_step_s": None if answer.setting is None else answer.setting.step_s,
        "state_precision": answer.state_precision,
        "master_weights": answer.master_weights,
        "rows": placement_rows(answer),
        "plan": json.loads(answer.placement.to_json()),
        "solved": answer.solved,
        "advice": [dataclasses.asdict(advice) for advice in answer.advice],
        "why": list(explain_placement(answer)),
    }


def placement_to_json(answer: PlacementAnswer) -> str:
    """A placement that is the whole answer."""
    document = {
        "format": FORMAT_VERSION,
        "fits": True,
        "placement": {"fits": True, **placement_document(answer)},
    }
    return json.dumps(document, indent=2)
