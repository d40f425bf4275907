"""Plain and damped fixed-point iteration."""

from typing import Any

from deq_jax._checks import check_number
from deq_jax._config import Number, config
from deq_jax._vectors import Vec, scaled
from deq_jax.solvers.protocol import LoopOptions


@config
class Picard(LoopOptions):
    """z ← z + damping (f(z) − z). Converges where the spectral radius of the damped Jacobian is below one.

    The cheapest iteration, and the best one for a strong contraction; hopeless where f expands. With
    `adjoint=Unroll()` and `max_steps=L` it is the weight-tied network of L layers.

    With `test_every=k`, convergence is tested at z0 and then once in k evaluations. Where f costs no more than the
    test, as for many small problems, that pays for the k − 1 evaluations by which a problem may stop late. The budget
    still holds, and the residual reported is that of the z returned. `Unroll` and `Reversible`, whose depth is fixed,
    ignore the option.

    >>> Picard(rtol=1e-6).max_steps
    100
    """

    damping: Number = 1.0

    flat = False
    may_begin_apart = True

    def __post_init__(self):
        super().__post_init__()
        check_number(self, "damping", above=0, at_most=2)

    def init(self, z: Vec) -> tuple[()]:
        return ()

    def update(self, residual: Vec, state: Any, z: Vec) -> tuple[Vec, tuple[()]]:
        return scaled(self.damping, residual), state
