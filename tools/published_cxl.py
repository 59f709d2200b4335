"""Fine-tuning with host memory on DRAM and CXL: the paper's rule and ours, on its own rates."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from offload.swap.placement import (
    MemoryNode,
    PlacedTensor,
    Shares,
    by_benefit,
    by_class,
    interleaved,
    step_seconds,
)
from offload.swap.planning.block_schedule import Block, Traffic, ticks_of
from offload.swap.planning.schedule import Lane, Medium, Schedule
from offload.swap.planning.timeline import simulate

_GIB = float(1 << 30)
_RULES = {"class": by_class, "interleave": interleaved, "benefit": by_benefit}


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One model, one length, some nodes."""

    inputs: Mapping[str, Any]
    model: Mapping[str, float]
    tokens: int
    nodes: tuple[MemoryNode, ...]

    def seconds(self, rule: str) -> float:
        """Of a step whose host tensors lie as ``rule`` says."""
        tensors = self._tensors()
        shares = _RULES[rule](list(tensors.values()), self.nodes)
        layers = int(self.model["layers"])
        states = [tensor for tensor in tensors.values() if tensor.role == "state"]
        forward_s = self._forward_s()
        block = Block(
            name="layer",
            forward_s=forward_s,
            backward_s=3 * forward_s,  # recomputed from its checkpoint
            optimizer_s=step_seconds(states, self.nodes, shares) / layers,
            traffic=tuple(
                one
                for role in ("weight", "activation", "gradient")
                for one in _traffic(tensors[role], shares, layers)
            ),
        )
        blocks = [
            Block(
                name=f"layer {index}",
                forward_s=block.forward_s,
                backward_s=block.backward_s,
                optimizer_s=block.optimizer_s,
                traffic=block.traffic,
            )
            for index in range(layers)
        ]
        lanes, media = _lanes(self.nodes)
        return simulate(Schedule(lanes=lanes, media=media, ticks=ticks_of(blocks))).step_s

    def _tensors(self) -> dict[str, PlacedTensor]:
        """The seven groups, in the order of the authors' allocator."""
        parameters = int(self.model["parameters"])
        checkpoints = int(2 * self.tokens * self.model["hidden"] * self.model["layers"])
        states = ("momentum", "variance", "master gradient", "master weight")
        return {
            **{
                name: PlacedTensor(name=name, role="state", nbytes=4 * parameters, cpu_touches=1)
                for name in states
            },
            "weight": PlacedTensor(
                name="weight", role="weight", nbytes=2 * parameters, dma_reads=2
            ),
            "activation": PlacedTensor(
                name="activation",
                role="activation",
                nbytes=checkpoints,
                dma_reads=1,
                dma_writes=1,
            ),
            "gradient": PlacedTensor(
                name="gradient", role="gradient", nbytes=2 * parameters, dma_writes=1
            ),
        }

    def _forward_s(self) -> float:
        """Of a layer, the head's share included; attention under a causal mask."""
        products = 2 * self.model["parameters"] / self.model["layers"] * self.tokens
        attention = 2 * self.tokens**2 * self.model["heads_width"]
        rate = self.inputs["gpu_flops"]["value"] * self.inputs["gpu_share"]["value"]
        return float((products + attention) / rate)


def figures(inputs: Mapping[str, Any]) -> dict[str, float]:
    """Ours, by claim."""
    ours: dict[str, float] = {}
    for name, model in inputs["models"]["value"].items():
        for tokens in inputs["lengths"]["value"]:
            label = f"{name}_{tokens}"
            one, two, dram = (
                _Run(inputs=inputs, model=model, tokens=tokens, nodes=nodes)
                for nodes in (_nodes(inputs, 1), _nodes(inputs, 2), _dram_only(inputs))
            )
            alone_s, aware_s = dram.seconds("class"), one.seconds("class")
            ours[f"one_{label}"] = 100 * alone_s / aware_s
            ours[f"gain_{label}"] = 100 * (one.seconds("interleave") / aware_s - 1)
            ours[f"ours_{label}"] = 100 * alone_s / one.seconds("benefit")
            ours[f"two_{label}"] = 100 * alone_s / two.seconds("class")
    return ours


def _nodes(inputs: Mapping[str, Any], cards: int) -> tuple[MemoryNode, ...]:
    node = _dram_only(inputs, int(inputs["dram_nbytes"]["value"]))
    adam = 16 * inputs["adam_elements"]["value"]
    return (
        *node,
        *(
            MemoryNode(
                index=1 + card,
                local=False,
                capacity_nbytes=int(inputs["cxl_nbytes"]["value"]),
                cpu_bytes_per_s=adam / inputs["adam_cxl_s"]["value"],
                dma_read_bytes_per_s=inputs["read_cxl_gib_per_s"]["value"] * _GIB,
                dma_write_bytes_per_s=inputs["write_cxl_gib_per_s"]["value"] * _GIB,
            )
            for card in range(cards)
        ),
    )


def _dram_only(inputs: Mapping[str, Any], nbytes: int = 1 << 50) -> tuple[MemoryNode, ...]:
    return (
        MemoryNode(
            index=0,
            local=True,
            capacity_nbytes=nbytes,
            cpu_bytes_per_s=16 * inputs["adam_elements"]["value"] / inputs["adam_dram_s"]["value"],
            dma_read_bytes_per_s=inputs["read_dram_gib_per_s"]["value"] * _GIB,
            dma_write_bytes_per_s=inputs["write_dram_gib_per_s"]["value"] * _GIB,
        ),
    )


def _lanes(nodes: tuple[MemoryNode, ...]) -> tuple[tuple[Lane, ...], tuple[Medium, ...]]:
    """One each way for each node; together they carry what DRAM alone fills the bus with."""
    lanes = []
    for node in nodes:
        name = f"numa:{node.index}"
        lanes += [
            Lane(
                name=f"{name}→device",
                source=name,
                target="device",
                bytes_per_s=node.dma_read_bytes_per_s,
                media=("bus to the device",),
            ),
            Lane(
                name=f"device→{name}",
                source="device",
                target=name,
                bytes_per_s=node.dma_write_bytes_per_s,
                media=("bus from the device",),
            ),
        ]
    media = (
        Medium(name="bus to the device", bytes_per_s=nodes[0].dma_read_bytes_per_s),
        Medium(name="bus from the device", bytes_per_s=nodes[0].dma_write_bytes_per_s),
    )
    return tuple(lanes), media


def _traffic(tensor: PlacedTensor, shares: Shares, layers: int) -> list[Traffic]:
    """A layer's part of ``tensor`` on each node."""
    fetched = {"weight": ("forward", "backward"), "activation": ("backward",), "gradient": ()}
    evicted = {"weight": (), "activation": ("forward",), "gradient": ("backward",)}
    return [
        Traffic(
            role=tensor.role,
            name=f"{tensor.name} on {node}",
            nbytes=nbytes // layers,
            fetched=fetched[tensor.role],  # type: ignore[arg-type]
            evicted=evicted[tensor.role],  # type: ignore[arg-type]
            fetch_by=(f"numa:{node}→device",),
            evict_by=(f"device→numa:{node}",),
        )
        for node, nbytes in shares[tensor.name]
    ]
