"""Small machines and work that the tests of placements share, and a brute force over them."""

import itertools
import random
from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from offload.swap.planning.placing.check import check, held_nbytes, lane_seconds, phase_seconds
from offload.swap.planning.placing.choices import REBUILD, Rules, class_nbytes, stepped_roles
from offload.swap.planning.placing.network import (
    COMPUTE,
    CPU,
    Limit,
    Network,
    Stepper,
    make_network,
)
from offload.swap.planning.placing.placement import ClassPlacement, Placement, Share
from offload.swap.planning.placing.schedule import schedule_of
from offload.swap.planning.placing.solve import place
from offload.swap.planning.placing.work import BlockWork, Recoded, SavedPart, Work
from offload.tiers.machine import Link, Machine, MachineTier, Processor

MIB = 1 << 20
GIB = 1 << 30


def tier(name, kind, gib, medium="memory"):
    return MachineTier(
        name=name, kind=kind, capacity_nbytes=gib * GIB, free_nbytes=gib * GIB,
        align_nbytes=4096, medium=medium,
    )  # fmt: skip


def link(source, target, gb_per_s):
    rate = gb_per_s * 1e9
    return Link(
        source=source, target=target, block_nbytes=32 * MIB, in_flight=4, bytes_per_s=rate,
        low_bytes_per_s=rate, high_bytes_per_s=rate, latency_s=1e-5, repeats=1,
    )  # fmt: skip


def small_machine(*links, tiers=()):
    """A GPU, memory, a drive and a CXL node."""
    return Machine(
        kernel="none",
        processors=(Processor(name="cpu", model="cpu", cores=8, features=()),),
        tiers=(
            tier("host", "host", 64), tier("device:0", "device", 24),
            tier("file:a", "file", 1000, "nvme0"), tier("numa:1", "numa", 256, "cxl"), *tiers,
        ),
        links=links
        or (
            link("host", "host", 20), link("host", "device:0", 25), link("device:0", "host", 25),
            link("file:a", "host", 6), link("host", "file:a", 5), link("file:a", "file:a", 3),
            link("numa:1", "host", 20), link("host", "numa:1", 15),
        ),
    )  # fmt: skip


def steppers(cpu=50e9, device=500e9, tier="device:0"):
    return (
        Stepper(name="cpu", tier="host", lane=CPU, s_per_byte=1 / cpu),
        Stepper(name="device", tier=tier, lane=COMPUTE, s_per_byte=1 / device),
    )


def small_network(**budgets):
    given = {"device:0": 8 * GIB, "host": 32 * GIB, "file:a": 500 * GIB} | {
        name.replace("_", ":"): nbytes for name, nbytes in budgets.items()
    }
    return make_network(small_machine(), given, compute="device:0", steppers=steppers())


def block(name="layers.*", **changes):
    values = {
        "trained_nbytes": 400 * MIB, "gradients_nbytes": 400 * MIB, "states_nbytes": 1600 * MIB,
        "saved": (
            SavedPart(name="inputs", nbytes=64 * MIB),
            SavedPart(name="attention", nbytes=64 * MIB, rebuild_s=0.01, rowwise=False),
            SavedPart(name="rows", nbytes=900 * MIB, rebuild_s=0.03),
        ),
        "forward_s": 0.05, "backward_s": 0.1,
        "forward_workspace_nbytes": 200 * MIB, "backward_workspace_nbytes": 300 * MIB,
    }  # fmt: skip
    return BlockWork(name=name, **(values | changes))


def small_work(blocks=12, **changes):
    given = {"kinds": (block(),), "order": (0,) * blocks, "tokens": 4096}
    return Work(**(given | changes))


# Random small cases, whose every plan can be listed.


def placed(work=None, network=None, rules=None, **budgets):
    work, network = work or small_work(), network or small_network(**budgets)
    found = place([work], network, rules)
    check(found, work, network)
    return found


def fraction(found, role, where, part=None):
    shares = [share for share in found.of(0, role, part) if share.where == where]
    return sum(share.fraction for share in shares)


def random_case(seed: int) -> tuple[Work, Network, Rules]:
    rng = random.Random(seed)
    while True:
        work, network, rules = _draw(rng)
        if (
            sum(1 for _ in _sizes(work, network, rules)) > 1
            and _count(work, network, rules) <= 1500
        ):
            return work, network, rules


def _draw(rng: random.Random) -> tuple[Work, Network, Rules]:
    tiers = ["device:0", "host", "file:a", "numa:1"][: rng.choice([2, 3, 3, 4])]
    grain = rng.choice([1, 1, 2])
    kinds = rng.choice([1, 1, 2])
    order = [*range(kinds), *(rng.randrange(kinds) for _ in range(rng.choice([0, 1, 2])))]
    rng.shuffle(order)
    budgets = {name: rng.randrange(1, 60) * MIB for name in tiers}
    lanes = {
        (a, b): rng.uniform(0.2, 5) / (20 * MIB)
        for name in tiers[1:]
        for pair in (("device:0" if name == "host" else name, "host"),)
        for a, b in (pair, pair[::-1])
    }
    routes = {}
    for a, b in itertools.permutations(tiers, 2):
        hops = [(a, b)] if "host" in (a, b) else [(a, "host"), ("host", b)]
        routes[a, b] = {f"{x} → {y}": lanes[x, y] for x, y in hops}
    limits = [Limit(name=name, lanes={name: 1.0}) for name in (COMPUTE, CPU)]
    limits += [Limit(name=f"{a} → {b}", lanes={f"{a} → {b}": 1.0}) for a, b in lanes]
    if "file:a" in tiers:
        limits.append(
            Limit(name="drive", lanes={"file:a → host": 1.0, "host → file:a": rng.random()})
        )
    speeds = steppers(20 * MIB * rng.uniform(0.5, 5), 20 * MIB * rng.uniform(1, 10))
    network = Network(
        compute="device:0",
        budgets=budgets,
        routes=routes,
        limits=tuple(limits),
        steppers=speeds[: rng.choice([1, 2])],
    )
    store = rng.choice([None, "file:a"]) if "file:a" in tiers else None
    if store:
        budgets[store] *= 6
    work = Work(
        kinds=tuple(_draw_kind(rng, f"kind{at}") for at in range(kinds)),
        order=tuple(order),
        passes=rng.choice([1, 1, 2]),
        fixed_nbytes={"host": rng.randrange(4) * MIB},
        store=store,
        slots=rng.choice([1, 2]),
        commits=bool(store) and rng.random() < 0.5,
        step_in_backward=rng.random() < 0.2,
    )
    rules = Rules(
        grain=grain,
        ahead=rng.random() < 0.7,
        staged=rng.random() < 0.2,
        even=rng.random() < 0.3,
        recoded_homes=tuple(tiers[1:]) if rng.random() < 0.3 else None,
    )
    return work, network, rules


def _draw_kind(rng: random.Random, name: str) -> BlockWork:
    def size(chance: float) -> int:
        return rng.randrange(1, 12) * MIB if rng.random() < chance else 0

    parts = []
    if rng.random() < 0.6:
        rebuild_s = rng.choice([None, rng.uniform(0, 2)])
        parts.append(
            SavedPart(name="rows", nbytes=size(1), rebuild_s=rebuild_s, rowwise=rng.random() < 0.6)
        )
    recoded = None
    if rng.random() < 0.4:
        recoded = Recoded(
            weights_nbytes=size(0.9), gradients_nbytes=size(0.9), states_nbytes=size(0.9),
            seconds=rng.uniform(0, 2),
        )  # fmt: skip
    return BlockWork(
        name=name, trained_nbytes=size(0.5), frozen_nbytes=size(0.2), gradients_nbytes=size(0.4),
        states_nbytes=size(0.4), recoded=recoded, saved=tuple(parts), forward_s=rng.uniform(0, 2),
        backward_s=rng.uniform(0, 3), forward_workspace_nbytes=size(0.4),
        backward_workspace_nbytes=size(0.4),
    )  # fmt: skip


def _sizes(work: Work, network: Network, rules: Rules) -> Iterator[list[ClassPlacement]]:
    """For each class of each kind, every way to place it."""
    stepping = rules.stepping(network)
    for number, kind in enumerate(work.kinds):
        classes = [(role, 0) for role in stepped_roles(kind)]
        classes += [("frozen", 0)] if kind.frozen_nbytes else []
        classes += [("saved", part) for part in range(len(kind.saved))]
        for role, part in classes:
            cells: list[tuple[Share, int]] = []
            names = [s.name for s in stepping] if role in stepped_roles(kind) else [None]
            for stepper in names:
                cells += [
                    (Share(where=tier, fraction=0, stepper=stepper), rules.grain)
                    for tier in _homes(kind, role, network, rules)
                ]
            if role == "saved" and kind.saved[part].rebuild_s is not None:
                whole = not kind.saved[part].rowwise
                parts = work.order.count(number) if whole else rules.grain
                cells.append((Share(where=REBUILD, fraction=0), parts))
            yield [
                ClassPlacement(
                    kind=number,
                    blocks=work.order.count(number),
                    role=role,
                    part=kind.saved[part].name if role == "saved" else None,
                    nbytes=class_nbytes(kind, role, part),
                    shares=shares,
                )
                for shares in _distributions(cells, Fraction(1))
            ]


def _homes(kind, role, network, rules):
    if role == "states" and kind.recoded is not None and rules.recoded_homes is not None:
        return rules.recoded_homes
    return network.budgets


def _distributions(cells, left):
    if not cells:
        if left == 0:
            yield ()
        return
    (share, parts), *others = cells
    for units in range(parts + 1):
        fraction = Fraction(units, parts)
        if fraction > left:
            break
        for rest in _distributions(others, left - fraction):
            if units:
                placed = Share(where=share.where, fraction=float(fraction), stepper=share.stepper)
                yield (placed, *rest)
            else:
                yield rest


def _count(work: Work, network: Network, rules: Rules) -> int:
    total = 1
    for options in _sizes(work, network, rules):
        total *= len(options)
        if total > 10**6:
            break
    return total


def brute_force(work: Work, network: Network, rules: Rules) -> float | None:
    """The least seconds of a step over every plan there is; None if none fits.

    Each class is replayed alone, tick by tick; a plan takes the sum.
    """
    options = list(_sizes(work, network, rules))
    best = None
    for ahead in (True, False) if rules.ahead else (False,):
        base = _replay((), ahead, work, network, rules)
        measured = [
            [(one, *_minus(_replay((one,), ahead, work, network, rules), base)) for one in ways]
            for ways in options
        ]
        limit = np.array([[b + 1.0] for b in network.budgets.values()])
        for plan in itertools.product(*measured):
            if not _agree([one for one, _, _ in plan], even=rules.even):
                continue
            held = base[0] + sum(nbytes for _, nbytes, _ in plan)
            if (held > limit).any():
                continue
            seconds = dict(base[1])
            for _, _, spent in plan:
                for key, value in spent.items():
                    seconds[key] = seconds.get(key, 0.0) + value
            exposed_s = seconds.pop("exposed")
            step_s = exposed_s + sum(
                phase_seconds(seconds, _record((), ahead, work, rules), network)
            )
            best = step_s if best is None else min(best, step_s)
    return best


def _record(classes, ahead, work, rules):
    return Placement(
        kinds=tuple(kind.name for kind in work.kinds), order=work.order, passes=work.passes,
        tokens=work.tokens, ahead=ahead, staged=rules.staged, classes=tuple(classes), phases=(),
        exposed_s=0.0, uses=(), prices=(),
    )  # fmt: skip


def _replay(classes, ahead, work, network, rules):
    placement = _record(classes, ahead, work, rules)
    schedule = schedule_of(placement, work, network)
    held = held_nbytes(schedule, work, network)
    seconds, exposed_s = lane_seconds(placement, schedule, work, network)
    return np.array([held[tier] for tier in network.budgets]), {**seconds, "exposed": exposed_s}


def _minus(one, base):
    spent = {key: value - base[1].get(key, 0.0) for key, value in one[1].items()}
    return one[0] - base[0], spent


def _agree(classes, *, even):
    """Whether the classes of a kind, if ``even`` of all, are stepped in the same shares."""
    stepped = {}
    for one in classes:
        if one.role in {"weights", "gradients", "states"}:
            shares = {}
            for share in one.shares:
                shares[share.stepper] = shares.get(share.stepper, 0.0) + share.fraction
            if stepped.setdefault(0 if even else one.kind, shares) != shares:
                return False
    return True
