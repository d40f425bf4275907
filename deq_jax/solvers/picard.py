"""Plain and damped fixed-point iteration."""

from typing import Any

from jaxtyping import Array, Float

from deq_jax._config import Budget, check_number, check_stopping, config
from deq_jax.solvers.base import per_problem


@config
class Picard:
    """z ← z + damping (f(z) − z). Converges where the spectral radius of the damped Jacobian is below one.

    The cheapest iteration, and the best one for a strong contraction; hopeless where f expands. With
    `adjoint=Unroll()` and `max_steps=L` it is the weight-tied network of L layers.

    With `test_every=k`, convergence is tested at z0 and then once in k evaluations: where f costs no more than the
    test, as for many small problems, that pays for the k − 1 evaluations that a problem may be late. The budget is
    kept, and the residual reported is that of the z returned. `Unroll` and `Reversible`, whose depth is fixed, take no
    notice of it.

    >>> Picard(rtol=1e-6).max_steps
    100
    """

    rtol: float = 1e-4
    atol: float = 0.0
    max_steps: Budget = 100
    damping: float = 1.0
    test_every: int = 1

    def __post_init__(self):
        check_stopping(self)
        check_number(self, "damping", above=0, at_most=2)
        check_number(self, "test_every", at_least=1)

    def init(self, z: Float[Array, "*batch dim"]) -> tuple[()]:
        return ()

    def update(
        self, residual: Float[Array, "*batch dim"], state: Any, z: Float[Array, "*batch dim"]
    ) -> tuple[Float[Array, "*batch dim"], tuple[()]]:
        return per_problem(self.damping) * residual, state
