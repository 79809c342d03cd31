"""Eight CPU devices for every test, and quick compilation; both must be set before JAX starts its backend."""

import os

# The tests' programs run once or a few times: most of the time would go into optimising them.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import jax

jax.config.update("jax_num_cpu_devices", 8)
