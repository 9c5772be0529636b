"""Eight simulated CPU devices and JAX's strict checks, for every test."""

import os

# Tests compile hundreds of programs and run each for a moment; this is for
# those in other processes too. What is measured of a program (its memory, what
# it sends) is compiled with helpers.OPTIMIZED.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
