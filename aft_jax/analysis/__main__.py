"""Measures in finished runs whether adversarial examples behave like triggered images, and scores every model.

    python -m aft_jax.analysis --runs runs/table/runs/* --benign runs/table/runs/none-* --out observation.csv

    --runs      work directories of finished runs; the infected model and the purified ones are measured
    --benign    work directories of runs without an attack, of the same data and model, as controls; a control with the
                seed of the run is preferred
    --out       file for the table (shares in 0..1)
    --defenses  defenses whose purified models are measured, comma-separated, such as aft,ft (all); none for none
    --images    number of images (1000): test images for the observation, the defender's clean images for the score
    --norms     linf, l2 or both, comma-separated (linf,l2)
    --eps       sizes of the adversarial perturbations in 1/255 of the pixels' range, comma-separated (2,4,8,16,32);
                for l2 it is the root mean square over the image

Rows with `measured` = connection have the observation of one model, for one norm and eps. With `control` = benign the
model is the benign one, and the trigger the same. Rows with `measured` = score have the infection score of one model,
which needs no trigger. The command prints the ROC AUC of the scores for infected against benign models.

Exit status: 0 done, 2 a mistake in the command that you can correct.
"""

import argparse
import sys

from aft_jax.cli import Parser, complain
from aft_jax.errors import UserError, check_choice, user_path
from aft_jax.runtime.allocator import keep_freed_memory


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parses the flags.

    Raises:
        UserError: A flag is wrong or missing.
    """
    from aft_jax.adversarial.pgd import NORMS
    from aft_jax.pipeline.saved_run import read_defenses

    parser = Parser(prog='aft_jax.analysis', add_help=False)
    parser.add_argument('--runs', nargs='+', required=True)
    parser.add_argument('--benign', nargs='+', default=[])
    parser.add_argument('--out', required=True)
    parser.add_argument('--defenses', default='')
    parser.add_argument('--images', type=int, default=1000)
    parser.add_argument('--norms', default='linf,l2')
    parser.add_argument('--eps', default='2,4,8,16,32')
    flags = parser.parse_args(arguments)
    flags.defenses = read_defenses(flags.defenses)
    flags.norms = flags.norms.split(',')
    for norm in flags.norms:
        check_choice('--norms', norm, NORMS)
    try:
        flags.eps = [float(text) for text in flags.eps.split(',')]
    except ValueError:
        raise UserError(f'--eps={flags.eps} must be numbers, comma-separated, such as 2,4,8.') from None
    if not all(0 < eps <= 255 for eps in flags.eps):
        raise UserError('--eps must be above 0 and at most 255; it is in 1/255 of the range of pixels.')
    if flags.images < 2:
        raise UserError(f'--images={flags.images} must be at least 2.')
    flags.runs, flags.benign = (
        [user_path(text, flag) for text in texts]
        for flag, texts in (('--runs', flags.runs), ('--benign', flags.benign))
    )
    flags.out = user_path(flags.out, '--out')
    if not flags.out.parent.is_dir():
        raise UserError(f'--out={flags.out}: there is no directory {flags.out.parent}.')
    return flags


def main(arguments: list[str]) -> int:
    """Measures the runs, and returns the exit status."""
    if not arguments or {'--help', '-h'} & set(arguments):
        print(__doc__)
        return 0 if arguments else 2
    try:
        flags = parse(arguments)
        keep_freed_memory()
        from aft_jax import files
        from aft_jax.analysis import observation_table
        from aft_jax.results import table_rows

        rows: list[dict] = []
        settings = flags.norms, flags.eps, flags.images, flags.defenses
        for row in observation_table.measure(flags.runs, flags.benign, *settings):
            rows.append(row)
            # Written after every row, so that the user of a long measurement sees the rows so far.
            files.write_text(flags.out, table_rows.to_csv(rows, observation_table.COLUMNS))
    except UserError as error:
        return complain(error)
    print(observation_table.summary(rows))
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
