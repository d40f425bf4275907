"""Every adjoint, for tests of what all of them can do."""

import deq_jax as deq

ADJOINTS = {
    "implicit": deq.Implicit(),
    "implicit_jvp": deq.ImplicitJVP(),
    "shine": deq.Shine(),
    "phantom": deq.Phantom(),
    "neumann": deq.Neumann(),
    "jfb": deq.JFB(),
    "unroll": deq.Unroll(),
    "unroll_stop": deq.Unroll(stop=True, checkpoint=4),
    "reversible": deq.Reversible(),
}
