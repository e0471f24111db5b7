"""The data that every compiled call gets: indices into a data set on the devices, or the batches themselves.

    device   every device holds the data set as uint8, and a call gets the indices of its batches
    host     every process holds the data set, and gathers its part of the batches while the previous call runs

Both give a step the same batch, so the results are the same.
"""

import contextlib
import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from aft_jax.data.order import Order
from aft_jax.runtime.sharding import batch_sharding, replicate, replicated
from aft_jax.training.state import Batch

PLACEMENTS = ('auto', 'device', 'host')
# Largest share of a device's memory for the data set; the rest is for training.
LARGEST_SHARE = 0.25
PREFETCHED_CALLS = 2
BATCH_AXIS = 2  # the arrays of a call are [steps, streams, batch, ...]

Arrays = dict[str, np.ndarray]
Span = tuple[int, int]


class Feed:
    """The data of the calls of one stage.

    Attributes:
        data: Data set on the devices, an argument of every call, or None with placement 'host'.
    """

    def __init__(self, mesh: Mesh, arrays: Arrays, orders: Sequence[Order], placement: str):
        """Prepares batches of `arrays` (N rows each), one `Order` per stream; `placement` is one of `PLACEMENTS`."""
        if placement == 'auto':
            placement = 'device' if fits(mesh, arrays) else 'host'
        self._mesh, self._arrays, self._orders = mesh, arrays, orders
        self.data = replicate(mesh, arrays) if placement == 'device' else None

    def indices(self, span: Span) -> np.ndarray:
        """Computes int32 [steps, streams, batch], the rows of the steps first ... last - 1."""
        return np.stack([[order.batch(step) for order in self._orders] for step in range(*span)])

    def _make(self, span: Span) -> Any:
        indices = self.indices(span)
        sharding = batch_sharding(self._mesh, BATCH_AXIS)
        if self.data is not None:
            return jax.make_array_from_callback(indices.shape, sharding, lambda part: indices[part])

        def rows(array: np.ndarray) -> jax.Array:
            shape = (*indices.shape, *array.shape[1:])

            def part_of(index: Any) -> np.ndarray:
                return array[indices[index[: indices.ndim]]]

            return jax.make_array_from_callback(shape, sharding, part_of)

        return {name: rows(array) for name, array in self._arrays.items()}

    @contextlib.contextmanager
    def calls(self, spans: Sequence[Span]) -> Iterator[Iterator[Any]]:
        """Provides an iterator over the data of each call; with placement 'host' a thread gathers them ahead."""
        if self.data is not None:
            yield map(self._make, spans)
            return
        with ahead(self._make, spans) as made:
            yield made


def read(data: dict[str, jax.Array] | None, fed: Any) -> list[Batch]:
    """Reads the batches of one step, one per stream; uint8 images become float32 in [0, 1].

    Args:
        data: Data set on the devices, or None; see `Feed.data`.
        fed: Data of one step of a call: indices [streams, batch], or arrays [streams, batch, ...] by name.
    """
    rows = fed if data is None else {name: array[fed] for name, array in data.items()}
    rows = rows | {'images': rows['images'].astype(jnp.float32) / 255.0}
    streams = len(rows['images'])
    return [{name: array[i] for name, array in rows.items()} for i in range(streams)]


def fits(mesh: Mesh, arrays: Arrays) -> bool:
    """Returns whether every device has room for the arrays; always true on a CPU, which shares the host's memory."""
    device = next(d for d in mesh.devices.flat if d.process_index == jax.process_index())
    if device.platform == 'cpu':
        return True
    limit = (device.memory_stats() or {}).get('bytes_limit', math.inf)
    return sum(array.nbytes for array in arrays.values()) <= LARGEST_SHARE * limit


@contextlib.contextmanager
def ahead(make: Callable[[Span], Any], spans: Sequence[Span]) -> Iterator[Iterator[Any]]:
    """Provides an iterator over make(span), computed a few ahead in a thread; errors of the thread are raised here."""
    results: queue.Queue = queue.Queue(maxsize=PREFETCHED_CALLS)
    stopped = threading.Event()

    def hand_over(item: Any) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                results.put(item, timeout=0.1)
                return

    def work() -> None:
        try:
            for span in spans:
                if stopped.is_set():
                    return
                hand_over((make(span), None))
        except BaseException as error:
            hand_over((None, error))

    def taken() -> Iterator[Any]:
        for _ in spans:
            item, error = results.get()
            if error is not None:
                raise error
            yield item

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        stopped.set()
        thread.join()


def shardings(mesh: Mesh) -> tuple:
    """Returns the shardings of a call's arguments: state, data, constants, fed, key."""
    whole = replicated(mesh)
    return whole, whole, whole, batch_sharding(mesh, BATCH_AXIS), whole
