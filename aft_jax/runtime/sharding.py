"""Where arrays live: state replicated, batches cut along a one-axis mesh called 'data'.

Batch statistics and losses are those of the global batch, so a result does not depend on the number of devices, nor on
how many processes hold them. Every process has the whole of a host array at hand, and gives its devices their part.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from aft_jax.errors import UserError


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """Returns a mesh over the devices (default: all of them, of every process)."""
    devices = devices or jax.devices()
    return jax.make_mesh((len(devices),), ('data',), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, axis: int) -> NamedSharding:
    """Cut along one axis of the array, the batch's."""
    return NamedSharding(mesh, P(*[None] * axis, 'data'))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Returns the pytree with every array on all devices of the mesh; all processes give the same values."""
    sharding = replicated(mesh)
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def put(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return leaf  # it lives on the mesh already
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        return jax.make_array_from_callback(leaf.shape, sharding, lambda cut: np.asarray(leaf)[cut])

    return jax.tree.map(put, tree)


def copy(mesh: Mesh, tree: Any) -> Any:
    """Returns the pytree in new memory on all devices of the mesh, so that it may be donated."""
    fresh = jax.jit(lambda t: jax.tree.map(jnp.copy, t), out_shardings=replicated(mesh))
    return fresh(replicate(mesh, tree))


def wait_on_virtual_devices(mesh: Mesh, tree: Any) -> Any:
    """Returns the pytree, waiting for it where more calls in flight would be dangerous.

    Several virtual CPU devices share few threads, and the collectives of two calls can then wait for each other for
    ever. Accelerators and a single CPU device take as many calls as the caller likes.
    """
    virtual = mesh.size > 1 and mesh.devices.flat[0].platform == 'cpu'
    return jax.block_until_ready(tree) if virtual else tree


def check_batch_size(mesh: Mesh, batch_size: int, field: str) -> None:
    """Raises UserError, naming sizes that work, when the devices do not divide the batch."""
    count = mesh.size
    if batch_size % count:
        below, above = batch_size // count * count, (batch_size // count + 1) * count
        fitting = f'{below} or {above}' if below else f'{above}'
        raise UserError(f'{field}={batch_size} cannot be divided among {count} devices; {fitting} would work.')
