"""The table of scans: the verdicts that are counted, and mistakes in the command, which test_analysis.py runs."""

import pytest

from aft_jax import scan_runs
from aft_jax.analysis import scan_table
from aft_jax.analysis.backdoor_scan import limit_of
from aft_jax.analysis.scan_table import ScannedModel
from aft_jax.report import scan_figure


def model(above: float, *, asr=None, target=None, label=3, defense='none', kind='mask') -> ScannedModel:
    """Builds a model whose change of a kind is above the limit."""
    excess = limit_of(kind, defense != 'none') + above
    return ScannedModel('run', defense, asr, target, {kind: (excess, label), 'blur': (0.0, 5)})


MODELS = [
    model(0.2, asr=0.95, target=3),
    model(0.1, asr=0.9, target=4),
    model(0.1, asr=1.0, label=None),
    model(-0.1, asr=0.8, target=3),
    # A weak backdoor counts on neither side.
    model(0.2, asr=0.7, target=3),
    model(-0.2),
    model(0.15),
    model(0.1, asr=0.3, defense='ft'),
    model(-0.1, asr=0.1, defense='aft'),
    model(-0.2, defense='aft'),
]


def test_summary_counts_the_verdicts():
    # Of the eight pairs of four positives and two negatives, the negative -0.2 is below all, and 0.15 below one.
    assert scan_table.summary(MODELS) == '\n'.join(
        [
            'before purification: a backdoor is found in 3 of 4 models with an ASR at least 80%,',
            '  and in 1 of 2 benign ones. AUC 0.625',
            '  The label is right for 1 of 2 found all-to-one backdoors.',
            'purified: a backdoor is found in 1 of 1 models with an ASR above 20%,',
            '  in 0 of 1 with an ASR of at most 20%,',
            '  and in 0 of 1 benign ones. AUC 1.000',
        ]
    )


def test_figure_has_the_rates_of_each_limit():
    before, after = scan_figure.draw(MODELS).axes
    curve, verdict = before.lines[:2]
    assert curve.get_xdata()[-1] == curve.get_ydata()[-1] == 100 and curve.get_xdata()[0] == curve.get_ydata()[0] == 0
    assert (verdict.get_xdata()[0], verdict.get_ydata()[0]) == (50, 75)
    assert before.get_title() == 'before purification: 4 with a backdoor, 2 benign'
    assert after.get_title() == 'purified: 1 with a backdoor, 1 benign'


@pytest.mark.parametrize('flags', [['--runs', 'a/x', 'b/x', '--workdir', 'w'], ['--runs', 'a', '--workdir', 'w']])
def test_scan_runs_refuses_mistakes(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert scan_runs.main(flags) == 2
    assert capsys.readouterr().err.startswith('aft_jax: ')
