"""Shardings on a mesh with the single axis 'data': state is replicated, batches are split along the axis.

Batch statistics and losses are computed over the global batch. So results do not depend on the number of devices or
processes. Every process holds host arrays as a whole, and copies to each of its devices the part of that device.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from aft_jax.errors import UserError


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """Creates a mesh of the devices (default: all devices of all processes).

    Raises:
        UserError: JAX_PLATFORMS names a platform that this machine does not have.
    """
    devices = devices or _all_devices()
    return jax.make_mesh((len(devices),), ('data',), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)


def _all_devices() -> list[jax.Device]:
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that the plugin of CUDA is installed
        platforms = jax.config.values['jax_platforms']
        if not platforms:
            raise
        reason = ' '.join(str(error).partition('(set JAX_PLATFORMS')[0].split()).rstrip('.') or 'it is not installed'
        raise UserError(
            f'JAX_PLATFORMS={platforms} cannot be used here ({reason}); unset it to use the devices that JAX finds, or '
            'set JAX_PLATFORMS=cpu.'
        ) from error


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding with the whole array on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, axis: int) -> NamedSharding:
    """Returns the sharding that splits an array along `axis`, its batch axis."""
    return NamedSharding(mesh, P(*[None] * axis, 'data'))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Copies every array of a pytree to all devices of the mesh; all processes must pass the same values."""
    sharding = replicated(mesh)
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def put(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return leaf  # already on the mesh
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: np.asarray(leaf)[index])

    return jax.tree.map(put, tree)


def copy(mesh: Mesh, tree: Any) -> Any:
    """Copies a pytree to new memory on all devices of the mesh, so that it may be donated."""
    fresh = jax.jit(lambda t: jax.tree.map(jnp.copy, t), out_shardings=replicated(mesh))
    return fresh(replicate(mesh, tree))


def wait_on_virtual_devices(mesh: Mesh, tree: Any) -> Any:
    """Waits for a pytree on virtual CPU devices, where several calls in flight may deadlock, and returns it.

    Several virtual CPU devices share few threads, so the collectives of two calls can wait for each other forever.
    Accelerators and a single CPU device do not wait here.
    """
    virtual = mesh.size > 1 and mesh.devices.flat[0].platform == 'cpu'
    return jax.block_until_ready(tree) if virtual else tree


def largest_batch(mesh: Mesh, count: int) -> int:
    """Computes the largest batch size of at most `count` images that divides over the devices; 0 if there is none."""
    return count // mesh.size * mesh.size


def check_batch_size(mesh: Mesh, batch_size: int, field: str) -> None:
    """Checks that the number of devices divides the batch size; the UserError names sizes that work."""
    count = mesh.size
    if batch_size % count:
        below, above = batch_size // count * count, (batch_size // count + 1) * count
        fitting = f'{below} or {above}' if below else f'{above}'
        raise UserError(f'{field}={batch_size} cannot be divided among {count} devices; {fitting} would work.')
