"""Eight simulated CPU devices and JAX's strict checks, for every test."""

import os
import tempfile

# Tests compile hundreds of programs and run each for a moment; this is for
# those in other processes too. What is measured of a program (its memory, what
# it sends) is compiled with helpers.OPTIMIZED.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# What one worker has compiled the others need not, nor processes that tests
# start. The folder goes with the process that made it: the first.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _compiled = tempfile.TemporaryDirectory(prefix="recjax-compiled-")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import hypothesis
import jax

# Time is never tested.
hypothesis.settings.register_profile(
  "recjax",
  deadline=None,
  suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("recjax")

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
