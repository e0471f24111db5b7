"""The results of a comparison: rows in a CSV file, and a printed table."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aft_jax.errors import UserError
from benchmarks.timing import Ratio

COLUMNS = (
    *('date', 'device', 'versions', 'benchmark', 'baseline', 'dtype', 'batch', 'ours_seconds', 'theirs_seconds'),
    *('ratio_median', 'ratio_min', 'ratio_max', 'alternations'),
)


class Ceiling(NamedTuple):
    """FLOP/s of a large matrix product and a large convolution."""

    product: float
    convolution: float


class Row(NamedTuple):
    """The result of one benchmark against one baseline.

    Attributes:
        benchmark: Classifier and benchmark, such as 'mnist_cnn/aft_step'.
        baseline: 'released', or 'tuned' with its fastest variant.
        dtype: Dtype of the computation.
        batch: Images in a step.
        ours: Seconds of one of our steps or epochs, the median of all turns.
        theirs: Seconds of a step or epoch of the baseline, the median of all turns.
        ratio: Ratios theirs / ours.
        images_a_second: Images a second of ours.
        flops: FLOP/s of ours.
        peaks: Bytes beside weights, optimiser and data, ours and theirs.
        first: Extra seconds of the first call, ours and theirs.
    """

    benchmark: str
    baseline: str
    dtype: str
    batch: int
    ours: float
    theirs: float
    ratio: Ratio
    images_a_second: float
    flops: float
    peaks: tuple[float, float]
    first: tuple[float, float]


def append(path: Path, new: Sequence[Row], shared: dict[str, Any]) -> None:
    """Appends rows to the CSV file, and writes the heading if the file is new.

    Raises:
        UserError: If the file has other columns, or cannot be written.
    """
    try:
        begins = not path.exists() or path.stat().st_size == 0
        if not begins and path.read_text().partition('\n')[0] != ','.join(COLUMNS):
            raise UserError(f'--out={path} is a file with other columns; choose another file.')
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open('a', newline='') as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
            if begins:
                writer.writeheader()
            for row in new:
                figures = {'ours_seconds': row.ours, 'theirs_seconds': row.theirs}
                figures |= {
                    f'ratio_{name}': value for name, value in zip(('median', 'min', 'max'), row.ratio, strict=True)
                }
                names = {field: getattr(row, field) for field in ('benchmark', 'baseline', 'dtype', 'batch')}
                writer.writerow(shared | names | {name: f'{value:.4g}' for name, value in figures.items()})
    except OSError as error:
        raise UserError(f'--out={path} cannot be written ({error.strerror}).') from error


def table(new: Sequence[Row], ceilings: dict[str, Ceiling]) -> str:
    """Formats the rows as a table for the terminal."""
    lines = [
        f'{"benchmark":39} {"batch":>5} {"dtype":8} {"baseline":15} {"ours s":>9} {"theirs s":>9} '
        f'{"ratio [min, max]":>19} {"images/s":>9} {"of conv (product)":>17} {"GB":>11} {"first call s":>13}'
    ]
    for row in new:
        ceiling = ceilings[row.dtype]
        share = f'{row.flops / ceiling.convolution:.0%} ({row.flops / ceiling.product:.0%})'
        spread = f'{row.ratio.median:.2f} [{row.ratio.least:.2f}, {row.ratio.most:.2f}]'
        peaks = '/'.join(f'{peak / 1e9:.3g}' for peak in row.peaks)
        first = '/'.join(f'{seconds:.1f}' for seconds in row.first)
        lines.append(
            f'{row.benchmark:39} {row.batch:5} {row.dtype:8} {row.baseline:15} {row.ours:9.4g} {row.theirs:9.4g} '
            f'{spread:>19} {row.images_a_second:9,.0f} {share:>17} {peaks:>11} {first:>13}'
        )
    lines += [
        'ratio = theirs / ours: above 1 ours is faster. Seconds are for a step or an epoch.',
        'images/s, and the share of the measured convolution (matrix product), are for ours.',
        'GB: memory beside weights, optimiser and data. first call: its extra seconds. Both are ours/theirs.',
    ]
    return '\n'.join(lines)
