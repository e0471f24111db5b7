"""Writers of metrics: metrics.jsonl, TensorBoard events, and the terminal."""

import json
import logging
import sys
import time
from pathlib import Path
from types import TracebackType

import jax
import numpy as np
from tqdm import tqdm

from aft_jax.files import set_aside, write_bytes
from aft_jax.training.tensorboard import EventFile

log = logging.getLogger(__name__)
PLAIN_LINE_SECONDS = 10.0
BAR = '{desc} {n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}'


class MetricWriter:
    """A writer of WORKDIR/metrics.jsonl and WORKDIR/tensorboard; only process 0 writes."""

    def __init__(self, workdir: Path, read_only: bool = False):
        """Creates a writer that appends to the files of `workdir`, or writes nothing if `read_only`."""
        self._path = workdir / 'metrics.jsonl'
        self._events_dir = workdir / 'tensorboard'
        self._claim = workdir / 'config.json'
        self._is_claimed = self._claim.exists()
        self._writes = jax.process_index() == 0 and not read_only
        self._events: dict[str, EventFile] = {}
        if self._writes and self._path.exists():
            self._repair()

    def _repair(self) -> None:
        """Removes a last line that was cut short when the process died. A file with other damage is set aside first."""
        lines = self._path.read_bytes().splitlines(keepends=True)
        good = [line for line in lines if _is_entry(line)]
        if good == lines:
            return
        if good != lines[:-1] or lines[-1].endswith(b'\n'):
            set_aside(self._path, f'{len(lines) - len(good)} of its {len(lines)} lines cannot be read')
        write_bytes(self._path, b''.join(good))

    def rewind(self, stage: str, step: int) -> None:
        """Removes the lines of `stage` after `step`, because those steps are about to be repeated.

        Step 0 removes all lines of the stage, including scores from before its first step.
        """
        if not self._writes or not self._path.exists():
            return
        kept = []
        for line in filter(_is_entry, self._path.read_bytes().splitlines(keepends=True)):
            entry = json.loads(line)
            if entry['stage'] != stage or (step > 0 and entry['step'] <= step):
                kept.append(line)
        write_bytes(self._path, b''.join(kept))

    def write(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Writes scalars of a stage at a step.

        Raises:
            OSError: The files cannot be written, or the work directory was removed. Others may have made it again.
        """
        if not self._writes:
            return
        if self._is_claimed:
            self._claim.stat()
        with self._path.open('a', encoding='utf-8') as file:
            file.write(json.dumps({'step': step, 'stage': stage} | values) + '\n')
        for name, value in values.items():
            self._events_of(stage, step).add_scalar(name, value, step)

    def write_images(self, stage: str, images: dict[str, np.ndarray]) -> None:
        """Writes pictures to TensorBoard, uint8 [H, W, C] by name; they replace those of an earlier start."""
        if not self._writes:
            return
        for name, image in images.items():
            self._events_of(stage, 0).add_image(name, image, 0)

    def _events_of(self, stage: str, step: int) -> EventFile:
        if stage not in self._events:
            self._events[stage] = EventFile(self._events_dir / stage, step)
        return self._events[stage]

    def close(self) -> None:
        """Flushes the TensorBoard events to disk."""
        for events in self._events.values():
            events.close()
        self._events.clear()


class Progress:
    """A progress bar on a terminal, or a line every ten seconds elsewhere; only process 0 shows it."""

    def __init__(self, stage: str, first: int, total: int, batch_size: int):
        """Starts the display of `stage` from step `first` to `total`, in steps of `batch_size` images."""
        self._stage, self._total, self._batch_size = stage, total, batch_size
        self._shows = jax.process_index() == 0
        self._bar = None
        self._first = self._step = first
        self._started = self._last_line = time.monotonic()
        if self._shows and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=first, desc=stage, dynamic_ncols=True, bar_format=BAR)

    def __enter__(self) -> 'Progress':
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, step: int, values: dict[str, float]) -> None:
        """Shows the progress of the stage and its latest metrics."""
        if not self._shows:
            return
        now = time.monotonic()
        steps_per_second = (step - self._first) / max(now - self._started, 1e-9)
        rate = steps_per_second * self._batch_size
        if self._bar is not None:
            self._bar.set_postfix_str(f'loss {values["loss"]:.4f}, {rate:,.0f} images/s')
            self._bar.update(step - self._step)
        elif now - self._last_line >= PLAIN_LINE_SECONDS or step == self._total:
            line = f'{self._stage}: step {step} of {self._total}, loss {values["loss"]:.4f}, {rate:,.0f} images/s'
            if step < self._total:
                line += f', {tqdm.format_interval((self._total - step) / steps_per_second)} left'
            print(line, file=sys.stderr, flush=True)
            self._last_line = now
        self._step = step


def _is_entry(line: bytes) -> bool:
    """Whether a line of metrics.jsonl is whole."""
    try:
        entry = json.loads(line)
        return line.endswith(b'\n') and isinstance(entry['stage'], str) and isinstance(entry['step'], int)
    except (ValueError, TypeError, KeyError):
        return False
