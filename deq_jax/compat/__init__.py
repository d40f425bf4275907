"""The interfaces of other libraries, over this one: `deq_jax.compat.jaxopt`."""
