"""table.png: clean accuracy and attack success rate of every case and defense, with their spread over seeds."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from aft_jax.summary import Group

# Okabe-Ito, told apart by colour-blind readers; the hatches say the same in grey print.
COLOURS = ('#595959', '#56B4E9', '#D55E00', '#009E73', '#E69F00', '#0072B2', '#CC79A7', '#F0E442')
HATCHES = ('', '//', '..', 'xx', '\\\\', '--', '++', 'oo')
PANELS = {'acc': 'ACC %', 'asr': 'ASR %'}


def write_bars(path: Path, groups: Sequence[Group]) -> None:
    """Draws a group of bars for each case, one a defense (`none` is the infected model itself).

    Args:
        path: Of the PNG.
        groups: As `summary.summarise` returns them.
    """
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(_case(group) for group in groups))
    defenses = list(dict.fromkeys(group.case['defense'] for group in groups))
    width = 0.8 / len(defenses)
    figure, axes = plt.subplots(
        len(PANELS), 1, figsize=(max(5.0, 1.1 * len(cases) + 1), 5.5), sharex=True, layout='constrained'
    )
    for axis, (score, title) in zip(axes, PANELS.items(), strict=True):
        for group in groups:
            if score not in group.scores:
                continue
            which = defenses.index(group.case['defense'])
            place = cases.index(_case(group)) + (which - (len(defenses) - 1) / 2) * width
            spread = group.scores[score]
            axis.bar(
                place,
                100 * spread.mean,
                width,
                yerr=None if spread.deviation is None else 100 * spread.deviation,
                color=COLOURS[which % len(COLOURS)],
                hatch=HATCHES[which % len(HATCHES)],
                edgecolor='white',
                capsize=2,
                label=group.case['defense'],
            )
        axis.set_ylabel(title)
        axis.set_ylim(0, 105)
        axis.spines[['top', 'right']].set_visible(False)
    axes[-1].set_xticks(np.arange(len(cases)), ['\n'.join(case) for case in cases])
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc='outside upper center', ncols=len(defenses), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _case(group: Group) -> tuple[str, str]:
    attack = group.case['attack']
    return (attack, group.case['label_mode']) if attack != 'none' else ('benign', '')
