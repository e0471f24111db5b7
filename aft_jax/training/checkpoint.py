"""Checkpoints of one stage, written by Orbax in the background and verified when they are read.

A checkpoint is complete or absent, because Orbax writes to a temporary name and renames. A checksum beside the arrays
reveals later damage. A damaged checkpoint is moved aside, and the one before it is used.
"""

import contextlib
import errno
import gc
import itertools
import json
import logging
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from aft_jax import files
from aft_jax.errors import UserError
from aft_jax.runtime import processes

log = logging.getLogger(__name__)
State = TypeVar('State')
# Time for unfinished reads of small files to end.
ABANDONED_READ_SECONDS = 0.05


class Checkpoints:
    """The checkpoints of one stage in one directory; a context manager that waits for unfinished writes."""

    def __init__(self, directory: Path, keep: int, read_only: bool = False):
        """Opens `directory`, creating it if needed; only the newest `keep` checkpoints are kept.

        Raises:
            UserError: The directory cannot be written, and is not opened `read_only`.
        """
        self.directory = Path(directory).absolute()
        self._keep = keep
        if not read_only:
            self._check_writable()
        self._manager = self._open()

    def __enter__(self) -> 'Checkpoints':
        if not isinstance(sys.unraisablehook, _AbandonedWritesAreSilent):
            sys.unraisablehook = _AbandonedWritesAreSilent(sys.unraisablehook)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error, the errors of writes in the background would hide it.
        with contextlib.suppress(Exception) if kind else contextlib.nullcontext():
            self._manager.wait_until_finished()
        with contextlib.suppress(Exception) if kind else contextlib.nullcontext():
            self._manager.close()
        if kind is None and isinstance(sys.unraisablehook, _AbandonedWritesAreSilent):
            sys.unraisablehook = sys.unraisablehook.before

    def _check_writable(self) -> None:
        """Raises a UserError if the directory cannot be written. Orbax notices it late, and then waits for minutes."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            reason = files.fault(self.directory)
        except OSError as error:
            reason = str(error.strerror)
        if reason:
            raise UserError(f'{self.directory} cannot be written ({reason}); correct this, or name another --workdir.')

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, create=True, enable_async_checkpointing=True)
        return ocp.CheckpointManager(self.directory, options=options)

    def save(self, step: int, state: Any, info: dict[str, Any]) -> None:
        """Starts writing the state under its step; returns when the state may be changed.

        Args:
            step: Number of steps taken.
            state: Pytree of replicated arrays.
            info: JSON values stored with the state.
        """
        if not self.directory.is_dir():  # Orbax would make it again, without the earlier checkpoints
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.directory))
        info = info | {'checksum': checksum(state)}
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), info=ocp.args.JsonSave(info))
        )

    def restore(self, template: State) -> tuple[State, dict[str, Any]] | None:
        """Loads the newest undamaged checkpoint.

        Args:
            template: State of the same structure, shapes, dtypes and shardings.

        Returns:
            (state, info), or None if there is no undamaged checkpoint.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            loaded, reason = None, 'another process could not read it'
            try:
                with _abandoned_reads_are_silent():
                    loaded = self._read(step, template)
            except MemoryError:
                raise
            except Exception as error:  # Damage makes Orbax and TensorStore raise errors of many kinds.
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            if processes.all_processes(loaded is not None):
                return loaded
            log.warning('The checkpoint %s is damaged and is skipped (%s).', self.directory / str(step), reason)
            with _abandoned_reads_are_silent():
                gc.collect()
            self._set_aside(step)
        return None

    def _read(self, step: int, template: State) -> tuple[State, dict[str, Any]]:
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), template)
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), info=ocp.args.JsonRestore())
        )
        state, info = restored['state'], restored['info']
        if checksum(state) != info['checksum']:
            raise ValueError('its arrays do not have the checksum that was stored with them')
        if not isinstance(info['seconds'], int | float) or not isinstance(info.get('pending', []), list):
            raise ValueError('its info has values of another type')
        return state, info

    def _set_aside(self, step: int) -> None:
        self._manager.close()
        processes.barrier('before a damaged checkpoint is moved')
        aside = self.directory.parent / f'{self.directory.name}.damaged'
        if jax.process_index() == 0:
            aside.mkdir(exist_ok=True)
            name = next(name for i in itertools.count() if not (aside / (name := f'{step}-{i}')).exists())
            (self.directory / str(step)).rename(aside / name)
        processes.barrier('after a damaged checkpoint was moved')
        self._manager = self._open()


class _AbandonedWritesAreSilent:
    """A hook for errors that cannot be caught: it drops those of writes that Orbax abandons after one has failed.

    They call back to an event loop that is closed, one traceback for each array, and the first error is raised anyway.
    The hook stays after an error, because the calls come late.
    """

    def __init__(self, before: Callable[[Any], Any]):
        """Creates the hook that passes all other errors to the hook `before`."""
        self.before = before

    def __call__(self, error: Any) -> None:
        """Drops an error, or passes it on."""
        if not (isinstance(error.exc_value, RuntimeError) and str(error.exc_value) == 'Event loop is closed'):
            self.before(error)


@contextlib.contextmanager
def _abandoned_reads_are_silent() -> Iterator[None]:
    """Keeps Orbax from printing tracebacks when it abandons the reads of other arrays after one has failed.

    The abandoned reads end in coroutines that Python collects later and in callbacks to a closed event loop. These
    errors cannot be caught, and the first error has been raised already. Written for Orbax 0.12.8; it may go with a
    version of Orbax that cancels the other reads after an error. It uses no private names.
    """
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        yield
    except Exception:
        time.sleep(ABANDONED_READ_SECONDS)
        raise
    finally:
        sys.unraisablehook = hook


def checksum(state: Any) -> int:
    """Computes a CRC-32 over the paths, dtypes, shapes and bytes of a pytree of replicated arrays."""
    value = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        array = np.asarray(leaf)
        header = json.dumps([jax.tree_util.keystr(path), str(array.dtype), array.shape])
        value = zlib.crc32(array.tobytes(), zlib.crc32(header.encode(), value))
    return value
