"""What adversarial examples are like: the page's figures of the observation.

Kinds of images differ in colour and marker or line, models in colour and hatch.
"""

from pathlib import Path
from typing import Any

import numpy as np

from aft_jax.analysis.measures import correlations
from aft_jax.analysis.observation import ADVERSARIAL, CLEAN, TRIGGERED, ModelOutputs
from aft_jax.evaluation.bootstrap import Estimate
from aft_jax.report.figure import COLOURS, FAINT, PAPER, Panel, panel
from aft_jax.results.record import percent

KINDS = {
    CLEAN: (FAINT, 'o', ':'),
    TRIGGERED: (COLOURS[2], '^', '-'),
    ADVERSARIAL: (COLOURS[5], 's', '--'),
}
# The first model and the purified one.
MODELS = ((COLOURS[6], '', 'o', '-'), (COLOURS[3], '////', 's', '--'))
# More classes than this do not fit below each other.
MOST_CLASSES = 14
# Of each kind; more hide each other.
MOST_POINTS = 150


def landing(
    directory: Path,
    predictions: dict[str, np.ndarray],
    labels: np.ndarray,
    target_map: np.ndarray | None,
    class_names: tuple[str, ...],
) -> Panel:
    """Draws which classes the adversarial examples land in that leave their own, by model, as shares of all examples.

    Args:
        directory: Of the files.
        predictions: int [N] by model, two at most.
        labels: int [N], the true classes.
        target_map: int [K], the commanded labels, whose part of a bar is solid; None without a trigger.
        class_names: K names.
    """
    classes = len(class_names)

    def shares(which: np.ndarray, answers: np.ndarray) -> np.ndarray:
        return np.bincount(answers[which], minlength=classes) / len(labels)

    left = {name: shares(said != labels, said) for name, said in predictions.items()}
    obeyed = {
        name: shares((said != labels) & (said == target_map[labels]), said) if target_map is not None else left[name]
        for name, said in predictions.items()
    }
    shown = _most_visited(np.max(list(left.values()), axis=0))
    names = [class_names[k][:18] for k in shown]
    if len(shown) < classes:
        names.append('others')
        rest = np.setdiff1d(np.arange(classes), shown)
        left, obeyed = (
            {name: np.append(values[shown], values[rest].sum()) for name, values in table.items()}
            for table in (left, obeyed)
        )
    told = [_told_landing(name, said, labels, target_map, class_names) for name, said in predictions.items()]

    def draw(axes: Any) -> None:
        height = 0.8 / len(left)
        for i, name in enumerate(left):
            colour, hatch, _, _ = MODELS[i]
            places = np.arange(len(names)) + (i - (len(left) - 1) / 2) * height
            common: dict[str, Any] = {'height': 0.88 * height, 'hatch': hatch, 'edgecolor': PAPER, 'linewidth': 0}
            if target_map is not None:
                axes.barh(places, 100 * left[name], color=colour, alpha=0.35, **common)
            axes.barh(places, 100 * obeyed[name], color=colour, label=name, **common)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel('% of the adversarial examples')
        axes.tick_params(axis='y', length=0)
        axes.legend(frameon=False, loc='lower right')

    alt = f'Bars, a row a class. {" ".join(told)}'
    tall = 0.9 + 0.15 * (len(left) + 0.4) * max(len(names), 4)
    return panel(directory, 'landing', 'Classes that adversarial examples land in', alt, draw, tall)


def activations(directory: Path, model: str, seen: ModelOutputs) -> Panel:
    """Draws the mean activation of the last feature map's channels by kind of image, sorted by the triggered ones."""
    means = {kind: channels.mean(axis=0, dtype=np.float64) for kind, channels in seen.channels.items()}
    sorted_by = TRIGGERED if TRIGGERED in means else CLEAN
    order = np.argsort(-means[sorted_by], kind='stable')

    def draw(axes: Any) -> None:
        for kind, values in means.items():
            colour, _, line = KINDS[kind]
            axes.plot(np.arange(1, len(order) + 1), values[order], color=colour, linestyle=line, label=kind)
        axes.set_xlabel(f'channels, sorted by {sorted_by}')
        axes.set_ylabel('mean activation')
        axes.legend(frameon=False, loc='lower left', bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2)

    alt = f'{model}: lines over {len(order)} channels, sorted by {sorted_by} images. Strongest tenth of the channels: '
    tenth = order[: max(1, round(len(order) / 10))]
    alt += ', '.join(f'{kind} {values[tenth].mean():.2f}' for kind, values in means.items()) + '.'
    if TRIGGERED in means:
        rises = [(means[kind] - means[CLEAN])[None] for kind in (TRIGGERED, ADVERSARIAL)]
        correlation = correlations(*rises)[0]
        if np.isfinite(correlation):
            alt += f' What the trigger raises and what adversarial changes raise correlate by {correlation:.2f}.'
    return panel(directory, f'activations_{model}', model, alt, draw)


def features(directory: Path, model: str, seen: ModelOutputs) -> Panel | None:
    """Draws the last features of the images in their first two principal components; None where they are not finite."""
    from sklearn.decomposition import PCA

    stacked = np.concatenate(list(seen.channels.values())).astype(np.float64)
    if not np.isfinite(stacked).all() or min(stacked.shape) < 2 or not stacked.std():
        return None
    analysis = PCA(n_components=2, svd_solver='full').fit(stacked)
    places = {kind: analysis.transform(channels.astype(np.float64)) for kind, channels in seen.channels.items()}

    def draw(axes: Any) -> None:
        for kind, points in places.items():
            colour, marker, _ = KINDS[kind]
            few = points[:MOST_POINTS]
            axes.scatter(*few.T, s=13, marker=marker, color=colour, alpha=0.7, linewidths=0, label=kind)
        axes.set_xticks([])
        axes.set_yticks([])
        first, second = (f'{100 * share:.0f} %' for share in analysis.explained_variance_ratio_)
        axes.set_xlabel(f'first component ({first} of the variance)')
        axes.set_ylabel(f'second ({second})')
        axes.legend(frameon=False, loc='best')

    centres = {kind: points.mean(axis=0) for kind, points in places.items()}
    alt = f'{model}: points in two principal components, {percent(sum(analysis.explained_variance_ratio_))} of the '
    alt += 'variance. The centre of the adversarial points is '
    alt += ' and '.join(
        f'{np.linalg.norm(centres[ADVERSARIAL] - centre):.2f} from that of the {kind} ones'
        for kind, centre in centres.items()
        if kind != ADVERSARIAL
    )
    return panel(directory, f'features_{model}', model, f'{alt}.', draw)


def target_share(directory: Path, eps: tuple[float, ...], swept: dict[str, list[Estimate]]) -> Panel:
    """Draws the share of fooling adversarial examples that get the attacker's label over their size, by model."""
    sizes = [255 * e for e in eps]

    def draw(axes: Any) -> None:
        for i, (name, estimates) in enumerate(swept.items()):
            colour, _, marker, line = MODELS[i]
            value, low, high = (100 * np.array(column) for column in zip(*estimates, strict=True))
            axes.plot(sizes, value, color=colour, marker=marker, linestyle=line, markersize=5, label=name)
            axes.fill_between(sizes, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.set_xscale('log', base=2)
        axes.set_xticks(sizes, [f'{size:g}' for size in sizes])
        axes.minorticks_off()
        axes.set_ylim(-3, 103)
        axes.set_xlabel('eps, in 1/255 of the pixels’ range')
        axes.set_ylabel('target share, %')
        axes.legend(frameon=False, loc='best')

    told = [
        f'{name}: '
        + ', '.join(
            f'{percent(e.value)} at {size:g}/255' if np.isfinite(e.value) else f'none fools at {size:g}/255'
            for size, e in zip(sizes, estimates, strict=True)
        )
        for name, estimates in swept.items()
    ]
    return panel(directory, 'target_share', 'Target share over eps', f'Lines over eps. {". ".join(told)}.', draw)


def _most_visited(shares: np.ndarray) -> np.ndarray:
    if len(shares) <= MOST_CLASSES:
        return np.arange(len(shares))
    return np.sort(np.argsort(-shares, kind='stable')[:MOST_CLASSES])


def _told_landing(
    name: str, said: np.ndarray, labels: np.ndarray, target_map: np.ndarray | None, class_names: tuple[str, ...]
) -> str:
    left = said[said != labels]
    if not len(left):
        return f'{name}: none leaves its class.'
    counts = np.bincount(left, minlength=len(class_names))
    text = (
        f'{name}: {percent(len(left) / len(labels))} leave their class, most of them to {class_names[counts.argmax()]} '
    )
    text += f'({percent(counts.max() / len(left))} of these)'
    if target_map is not None:
        obeying = float(np.mean(left == target_map[labels][said != labels]))
        text += f'; {percent(obeying)} of these go where the trigger commands'
    return f'{text}.'
