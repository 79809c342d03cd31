"""Models over a mesh of devices: the mesh, rules from path to `PartitionSpec`, and arrays placed by them.

    mesh = jpeft.make_mesh(data=-1, fsdp=4, tensor=2)
    model = jpeft.shard(model, mesh)
    batch = jpeft.shard_batch(batch, mesh)

Everything after that is plain `jax.jit`: the compiler inserts the collectives.
"""

from jpeft.sharding.mesh import AXES, BATCH, batch_sharding, make_mesh, shard_batch
from jpeft.sharding.placing import Shardings, optimizer_shardings, shard, shardings, specs, tell
from jpeft.sharding.rules import Rules

__all__ = [
    "AXES",
    "BATCH",
    "Rules",
    "Shardings",
    "batch_sharding",
    "make_mesh",
    "optimizer_shardings",
    "shard",
    "shard_batch",
    "shardings",
    "specs",
    "tell",
]
