"""A contender written in PyTorch."""

# pyright: reportMissingImports=false

import time
from collections.abc import Callable
from typing import Any

import torch

from experiments.benchmarks import torch_ops
from experiments.benchmarks.contenders import CONTENDERS
from experiments.benchmarks.process import clock, leave, resident
from experiments.shared.problems import Problem

COUNTS = {"f": 0, "vjp": 0, "jvp": 0}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Ticking(torch.autograd.Function):
    """The identity, counting f's evaluations and the pullbacks through it."""

    @staticmethod
    def forward(ctx, z):
        COUNTS["f"] += 1
        return z.view_as(z)

    @staticmethod
    def backward(ctx, z_bar):
        COUNTS["vjp"] += 1
        return z_bar


def commands(table: dict[str, Callable[[], Problem]]) -> dict[str, Callable]:
    built: dict[tuple[str, str], Callable] = {}

    def build(problem: str, contender: str, rtol: float, backward: float, scale: float, count: bool) -> dict[str, Any]:
        solve = CONTENDERS[contender].solve
        drawn = table[problem]()
        tensor = lambda x: torch.as_tensor(x, device=DEVICE)
        params = {name: tensor(x).requires_grad_() for name, x in drawn.params.items()}
        data = {name: tensor(x).long() if x.dtype.kind == "i" else tensor(x) for name, x in drawn.data.items()}
        zeros = torch.zeros(drawn.z_shape, device=DEVICE)

        def equilibrium(see):
            x = drawn.inject(torch_ops, params, data)
            cell = lambda z, params, x: drawn.cell(torch_ops, see(z), params, x)
            return solve(cell, zeros, params, x, rtol, backward, scale)

        def forward(see=lambda z: z):
            with torch.no_grad():
                z = equilibrium(see)
            _await()
            return z

        def step(see=lambda z: z):
            loss = drawn.readout(torch_ops, equilibrium(see), params, data)
            grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
            _await()
            return loss, dict(zip(params, grads, strict=True))

        report: dict[str, Any] = {"device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"}
        for name, f in (("forward", forward), ("step", step)):
            began = time.perf_counter()
            f()
            report[name] = {"compile_s": 0.0, "first_call_s": time.perf_counter() - began}
            if count:
                COUNTS.update(f=0, vjp=0, jvp=0)
                f(Ticking.apply)
                report[name] |= COUNTS
            built[contender, name] = f
        report["step"]["resident_bytes"] = resident()
        return report

    def save(contender: str, path: str) -> dict:
        z = built[contender, "forward"]()
        _, grads = built[contender, "step"]()
        leave(path, z.cpu().numpy(), {name: grad.detach().cpu().numpy() for name, grad in grads.items()})
        return {}

    return {
        "build": build,
        "save": save,
        "time": lambda contender, what, repeats: {"ms": clock(built[contender, what], repeats)},
    }


def _await() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
