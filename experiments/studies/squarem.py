"""SQUAREM beside Anderson on the maps of economists and statisticians, counted in evaluations.

python -m experiments.studies.squarem  # half a minute on one core; nothing is written

SQUAREM (Varadhan & Roland 2008, scheme S3) takes two plain steps and extrapolates from them; its memory is one residual
and a point to go back to. The library has no such solver, because of this table. Only for the EM of Gaussians that lie
close together is it ahead of Anderson, there by far.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.scipy.special import logsumexp
from jaxtyping import Array, Bool, Float

import deq_jax as deq
from experiments.shared.plots import markdown_table

BLOWN_UP = 10.0  # an extrapolated point whose residual is this many times that before is given up
GROWTH = 4.0  # of the longest step that is allowed


class SquaremState(NamedTuple):
    first: Bool[Array, "*batch"]  # whether the next residual is the first of a pair
    residual: Float[Array, "*batch dim"]  # the first of the pair
    size: Float[Array, "*batch"]  # its norm
    plain: Float[Array, "*batch dim"]  # where two plain steps have led to
    longest: Float[Array, "*batch"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Squarem:
    """x₀ + 2a r + a² v with r = f(x₀) − x₀, v = f(x₁) − x₁ − r and a = ‖r‖ / ‖v‖; a = 1 are two plain steps."""

    rtol: float = 1e-4
    atol: float = 0.0
    max_steps: int = 100

    def init(self, z: Float[Array, "*batch dim"]) -> SquaremState:
        one = jnp.ones(z.shape[:-1], z.dtype)
        return SquaremState(one > 0, jnp.zeros_like(z), one * jnp.inf, z, one)

    def update(self, residual: Any, state: SquaremState, z: Any) -> tuple[Any, SquaremState]:
        norm = lambda x: jnp.linalg.norm(x, axis=-1)
        pick = lambda where, a, b: jnp.where(where[..., None], a, b)
        size, first = norm(residual), state.first
        lost = first & ~(size <= BLOWN_UP * state.size)  # also where it is NaN
        v = residual - state.residual
        wanted = norm(state.residual) / jnp.maximum(norm(v), jnp.finfo(z.dtype).tiny)
        a = jnp.clip(wanted, 1, state.longest)[..., None]
        extrapolated = z + (2 * a - 1) * state.residual + a**2 * v  # z is x₁ = x₀ + r
        then = pick(first, pick(lost, state.plain, z + residual), extrapolated)
        longer = jnp.where(~first & (wanted >= state.longest), GROWTH * state.longest, state.longest)
        return then - z, SquaremState(
            first=jnp.where(first, lost, True),
            residual=pick(first, residual, state.residual),
            size=jnp.where(lost, jnp.inf, jnp.where(first, size, state.size)),
            plain=pick(first, state.plain, z + residual),
            longest=jnp.where(lost, jnp.maximum(state.longest / GROWTH, 1), longer),
        )


# ---- maps --------------------------------------------------------------------------------------------------


def bellman(discount: float, seed: int, smooth: bool) -> tuple[Callable, Float[Array, " n"]]:
    """The values of 100 states with 4 actions; smooth, with extreme-value shocks, as in Rust's model."""
    rng = np.random.default_rng(seed)
    transitions = jnp.asarray(rng.dirichlet(np.full(100, 0.05), size=(4, 100)))
    rewards = jnp.asarray(rng.normal(size=(4, 100)))
    best = (lambda q: logsumexp(q, axis=0)) if smooth else (lambda q: jnp.max(q, axis=0))
    return lambda v: best(rewards + discount * transitions @ v), jnp.zeros(100)


def logit_shares(spread: float, seed: int) -> tuple[Callable, Float[Array, " n"]]:
    """Mean utilities of 50 products from their market shares (Berry, Levinsohn & Pakes 1995), 200 consumers."""
    rng = np.random.default_rng(seed)
    tastes = spread * jnp.asarray(rng.normal(size=(200, 3)) @ rng.normal(size=(3, 50)))

    def log_shares(delta):
        utility = delta + tastes
        return logsumexp(utility - jnp.logaddexp(0.0, logsumexp(utility, axis=1, keepdims=True)), axis=0)

    observed = log_shares(jnp.asarray(rng.normal(size=50)) + 3)
    return lambda delta: delta + observed - log_shares(delta), jnp.zeros(50)


def poisson_mixture() -> tuple[Callable, Float[Array, " n"]]:
    """EM for two Poissons on the death notices of the Times (Hasselblad 1969): the data of SQUAREM's paper."""
    days, k = jnp.array([162.0, 267, 271, 185, 111, 61, 27, 8, 3, 1]), jnp.arange(10.0)

    def em(z):
        share, means = z[0], jnp.exp(z[1:])
        weight = jax.nn.sigmoid(share + k * (z[1] - z[2]) - means[0] + means[1])
        mean = lambda w: jnp.log(jnp.sum(w * days * k) / jnp.sum(w * days))
        share = jnp.sum(weight * days) / jnp.sum(days)
        return jnp.stack([jnp.log(share) - jnp.log1p(-share), mean(weight), mean(1 - weight)])

    return em, jnp.array([0.0, 0.0, 0.9])


def gaussian_mixture(distance: float, seed: int) -> tuple[Callable, Float[Array, " n"]]:
    """EM for three Gaussians on a line, of 500 points each, with standard deviation 1 at this distance."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(np.concatenate([rng.normal(i * distance, 1, 500) for i in range(3)]))[:, None]

    def em(z):
        log_share, mean, log_std = jnp.split(z, 3)
        weight = jax.nn.softmax(log_share - log_std - 0.5 * ((x - mean) / jnp.exp(log_std)) ** 2, axis=1)
        total = jnp.sum(weight, axis=0)
        mean = jnp.sum(weight * x, axis=0) / total
        variance = jnp.sum(weight * (x - mean) ** 2, axis=0) / total
        return jnp.concatenate([jnp.log(total / x.size), mean, 0.5 * jnp.log(variance)])

    return em, jnp.concatenate([jnp.full(3, -np.log(3)), jnp.linspace(-1, 3 * distance, 3), jnp.zeros(3)])


def maps() -> dict[str, tuple[Callable, Float[Array, " n"]]]:
    found = {}
    for discount in (0.9, 0.99, 0.999):
        found[f"Bellman, {discount}"] = bellman(discount, 0, smooth=False)
        found[f"Bellman with logit, {discount}"] = bellman(discount, 1, smooth=True)
    found |= {f"logit shares, spread {spread}": logit_shares(spread, 0) for spread in (1.0, 2.0)}
    found |= {f"EM, Gaussians at {distance}": gaussian_mixture(distance, 0) for distance in (1.5, 2.5)}
    return found | {"EM, Poissons": poisson_mixture()}


# ---- the table ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Evaluations in float64 until the relative residual is at most rtol."""

    rtol: float = 1e-6
    max_steps: int = 20_000


def main(config: Config = Config()) -> None:  # noqa: B008
    jax.config.update("jax_enable_x64", True)
    options: Any = dict(rtol=config.rtol, max_steps=config.max_steps)
    solvers = [deq.Picard(**options), deq.Anderson(history=3, **options), deq.Anderson(**options), Squarem(**options)]
    rows, quotients = [], []
    for name, (f, z0) in maps().items():
        found = [deq.solve(f, z0, solver=solver).stats for solver in solvers]
        cells = [str(int(s.steps)) if s.converged else deq.Status(int(s.status)).name for s in found]
        quotients.append(int(found[3].steps) / int(found[1].steps))
        rows.append([name, *cells, f"{quotients[-1]:.2f}"])
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, float64, rtol {config.rtol}")
    head = ["map", "Picard", "Anderson(3)", "Anderson(8)", "SQUAREM", "SQUAREM / Anderson(3)"]
    print("\n".join(markdown_table(head, rows)))
    median, mean = np.median(quotients), np.exp(np.mean(np.log(quotients)))
    print(f"evaluations of SQUAREM over those of Anderson(3): median {median:.2f}, geometric mean {mean:.2f}")


if __name__ == "__main__":
    main(tyro.cli(Config))
