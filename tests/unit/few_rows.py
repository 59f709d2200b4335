"""Products that round differently for few rows, as libraries do that have a kernel for these."""

from offload.swap.tokenwise import replay


def round_differently(monkeypatch, fewest, products=("mm", "addmm")):
    """Rebuilt products of fewer rows than ``fewest`` differ in their last bits."""
    functional, writing_out = replay._functional, replay.writing_out

    def rounding(func, op):
        if func is None or op.split(".")[1] not in products:
            return func

        def product(*args, **kwargs):
            result = func(*args, **kwargs)
            rows = result.numel() // result.shape[-1]
            return result.mul_(1 + 1e-6) if rows < fewest else result

        return product

    monkeypatch.setattr(replay, "_functional", lambda op: rounding(functional(op), op))
    monkeypatch.setattr(replay, "writing_out", lambda op: rounding(writing_out(op), op))
