"""What a compiled call is fed with: indices into data that live on the devices, or the images themselves.

    device   the data set lives on every device as uint8, and a call takes the indices of its batches
    host     it stays with the processes; each gathers its devices' share of the batches, while the call before runs

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
# Of a device's memory that the data set may take; the rest is for the training.
LARGEST_SHARE = 0.25
PREFETCHED_CALLS = 2
BATCH_AXIS = 2  # of what a call is fed with: [steps, streams, batch, ...]

Arrays = dict[str, np.ndarray]
Span = tuple[int, int]


class Feed:
    """Feeds the calls of one stage.

    Attributes:
        data: What every call is given: the data set on the devices, or None.
    """

    def __init__(self, mesh: Mesh, arrays: Arrays, orders: Sequence[Order], placement: str):
        """Feeds batches of `arrays` (N rows each) in the given orders, one a stream; see `PLACEMENTS`."""
        if placement == 'auto':
            placement = 'device' if fits(mesh, arrays) else 'host'
        self._mesh, self._arrays, self._orders = mesh, arrays, orders
        self.data = replicate(mesh, arrays) if placement == 'device' else None

    def indices(self, span: Span) -> np.ndarray:
        """Returns int32 [steps, streams, batch], the rows that the steps first ... last - 1 see."""
        return np.stack([[order.batch(step) for order in self._orders] for step in range(*span)])

    def _make(self, span: Span) -> Any:
        indices = self.indices(span)
        cut = batch_sharding(self._mesh, BATCH_AXIS)
        if self.data is not None:
            return jax.make_array_from_callback(indices.shape, cut, lambda part: indices[part])

        def rows(array: np.ndarray) -> jax.Array:
            shape = (*indices.shape, *array.shape[1:])

            def part_of(index: Any) -> np.ndarray:
                return array[indices[index[: indices.ndim]]]

            return jax.make_array_from_callback(shape, cut, part_of)

        return {name: rows(array) for name, array in self._arrays.items()}

    @contextlib.contextmanager
    def calls(self, spans: Sequence[Span]) -> Iterator[Iterator[Any]]:
        """Gives what each call is fed with, in order; with data on the hosts a thread gathers ahead."""
        if self.data is not None:
            yield map(self._make, spans)
            return
        with ahead(self._make, spans) as made:
            yield made


def read(data: dict[str, jax.Array] | None, fed: Any) -> list[Batch]:
    """Returns the batches of one step, one a stream; uint8 images become float32 in [0, 1].

    Args:
        data: As in `Feed.data`.
        fed: One step of what a call is fed with: indices [streams, batch], or arrays [streams, batch, ...] by name.
    """
    rows = fed if data is None else {name: array[fed] for name, array in data.items()}
    rows = rows | {'images': rows['images'].astype(jnp.float32) / 255.0}
    streams = len(rows['images'])
    return [{name: array[i] for name, array in rows.items()} for i in range(streams)]


def fits(mesh: Mesh, arrays: Arrays) -> bool:
    """Whether a copy of the arrays on every device leaves room enough; always on a CPU, whose memory it is anyway."""
    device = next(d for d in mesh.devices.flat if d.process_index == jax.process_index())
    if device.platform == 'cpu':
        return True
    limit = (device.memory_stats() or {}).get('bytes_limit', math.inf)
    return sum(array.nbytes for array in arrays.values()) <= LARGEST_SHARE * limit


@contextlib.contextmanager
def ahead(make: Callable[[Span], Any], spans: Sequence[Span]) -> Iterator[Iterator[Any]]:
    """Gives make(span) for each span, made in a thread of its own, a few ahead; an error in it is raised here."""
    made: queue.Queue = queue.Queue(maxsize=PREFETCHED_CALLS)
    stopped = threading.Event()

    def hand_over(item: Any) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                made.put(item, timeout=0.1)
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
            item, error = made.get()
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
