"""Training over a mesh of devices: `--mesh data=2,fsdp=2,model=2,seq=1`, any subset of these axes.

A mesh axis divides

- `data`: the batch;
- `fsdp`: the batch too, and each parameter and its optimizer state, which are gathered once a step;
- `model`: heads, inner features and channels, and the vocabulary where it can be divided;
- `seq`: the columns of a segment.

The models name the axes of their parameters (`deq_jax.models.common.param`). `RULES` says where these lie. All
communication is the compiler's: nothing here sends anything. The numbers do not depend on the mesh, up to rounding.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import linen, nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

AXES = ("data", "fsdp", "model", "seq")
BATCH = ("data", "fsdp")
# Logical axis of a parameter, and where it lies; the first that fits where a mesh axis is asked for twice.
RULES = (
    *((name, "model") for name in ("heads", "inner", "channels", "vocab")),
    *((name, "fsdp") for name in ("dim", "width")),
)


def parse(text: str) -> dict[str, int]:
    """The sizes of the mesh that an option describes; ValueError if it is not one.

    >>> parse("data=2,model=4")
    {'data': 2, 'fsdp': 1, 'model': 4, 'seq': 1}
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in AXES:
            close = difflib.get_close_matches(name, AXES, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"--mesh has the axes {', '.join(AXES)}, got {name!r}{hint}")
        if not size.isdecimal() or int(size) < 1 or name in sizes:
            raise ValueError(f"--mesh must be like data=2,fsdp=4, each axis once, got {text!r}")
        sizes[name] = int(size)
    return {name: sizes.get(name, 1) for name in AXES}


def check(text: str, **divided: tuple[int, Sequence[str]]) -> None:
    """ValueError unless the mesh divides these options: each has a size, and the mesh axes that divide it."""
    sizes = parse(text)
    for option, (size, axes) in divided.items():
        parts = math.prod(sizes[axis] for axis in axes)
        if size % parts:
            by = " × ".join(axes)
            raise ValueError(f"--mesh {text}: --{option.replace('_', '-')} {size} cannot be divided by {parts} ({by})")


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the arrays of a run lie. Without a mesh everything stays where JAX puts it."""

    mesh: Mesh | None = None

    @classmethod
    def over(cls, text: str | None) -> "Placement":
        """The placement that `--mesh` asks for; ValueError unless the mesh has as many devices as there are."""
        if not text:
            return cls()
        sizes, count = parse(text), jax.device_count()
        if math.prod(sizes.values()) != count:
            raise ValueError(f"--mesh {text} has {math.prod(sizes.values())} devices, and there are {count}")
        return cls(jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES)))

    def params(self, params: PyTree, gathered: bool = False) -> PyTree:
        """The sharding of each parameter of an `nnx.State`, as a plain dict; gathered over fsdp if asked."""
        logical = nnx.to_pure_dict(nnx.get_partition_spec(params))
        rules = [(name, axis) for name, axis in RULES if not (gathered and axis == "fsdp")]
        shapes = nnx.to_pure_dict(params)
        return jax.tree.map(lambda spec, x: self._sharding(self.fits(spec, x.shape, rules)), logical, shapes)

    def state(self, params: PyTree, state: Any, tx: optax.GradientTransformation) -> Any:
        """The sharding of each leaf of a `TrainState` or of its shapes: the optimizer's as that of its parameters."""
        shardings, whole = self.params(params), self._sharding(P())
        of_params = lambda _, sharding: sharding
        opt_state = optax.tree_utils.tree_map_params(
            tx, of_params, state.opt_state, shardings, transform_non_params=lambda _: whole
        )
        everywhere = jax.tree.map(lambda _: whole, state)
        carry = jax.tree.map(lambda _: self._sharding(P(BATCH)), state.carry)
        return everywhere._replace(params=shardings, opt_state=opt_state, carry=carry)

    def of_step(self, graphdef: Any, state: Any, tx: optax.GradientTransformation) -> tuple[Callable, Callable]:
        """What a compiled step applies to its parameters, to gather them once, and to its new state, to place it."""
        if self.mesh is None:
            return (lambda params: params), (lambda state: state)
        params = nnx.state(nnx.merge(graphdef, state.params), nnx.Param)
        gathered, placed = self.params(params, gathered=True), self.state(params, state, tx)
        hold = jax.lax.with_sharding_constraint
        return (lambda params: hold(params, gathered)), (lambda state: hold(state, placed))

    def by_tokens(self, nll: Callable) -> Callable:
        """`nll(params, hidden, targets)`, of which each device computes its own tokens.

        An adaptive softmax sorts tokens and works through them block by block. Over a whole batch XLA would gather that
        batch, and every device would compute every block.
        """
        if self.mesh is None:
            return nll
        tokens, options = P(BATCH, "seq"), {"axis_names": {*BATCH, "seq"}, "check_vma": False}
        return jax.shard_map(nll, mesh=self.mesh, in_specs=(P(), tokens, tokens), out_specs=tokens, **options)

    def batch(self, batch: Any) -> Any:
        """A segment with its rows and columns over the devices; rows that cannot be divided are kept whole."""
        if self.mesh is None:
            return batch
        # Each process cuts out what its devices hold.
        place = lambda x, over: jax.make_array_from_callback(np.shape(x), over, np.asarray(x).__getitem__)
        return jax.tree.map(place, batch, self.of_batch(batch))

    def of_batch(self, batch: Any) -> Any:
        """The sharding of each array of a segment, or of its shapes."""
        assert self.mesh is not None
        parts = math.prod(self.mesh.shape[name] for name in BATCH)
        rows = lambda x: BATCH if x.shape[0] % parts == 0 else None
        return jax.tree.map(lambda x: self._sharding(P(rows(x), "seq") if np.ndim(x) == 2 else P()), batch)

    def _sharding(self, spec: P) -> Any:
        return None if self.mesh is None else NamedSharding(self.mesh, spec)

    def fits(self, names: P, shape: tuple[int, ...], rules: list[tuple[str, str]]) -> P:
        """The spec of an array; an axis that cannot be divided, as a vocabulary of 65, is kept whole."""
        axes = linen.logical_to_mesh_axes(tuple(names), rules) or () if names else ()
        sizes = dict(self.mesh.shape) if self.mesh else {}
        return P(
            *(axis if axis and n % sizes.get(axis, 1) == 0 else None for axis, n in zip(axes, shape, strict=False))
        )


ONE_DEVICE = Placement()
