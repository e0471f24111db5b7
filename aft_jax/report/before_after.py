"""before_after.png: clean and triggered test images with the prediction of each model, beside the models' scores."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aft_jax.analysis.observation import TRIGGERED
from aft_jax.results.record import Results

COLUMNS = 8
# Okabe-Ito colours: colour-blind readers can tell them apart, and they differ in grey print. The labels are text too.
TRUE_COLOUR, TARGET_COLOUR, OTHER_COLOUR = '#0072B2', '#D55E00', '#595959'


class Examples(NamedTuple):
    """k test images, and what each model predicts for them.

    Attributes:
        images: Images by kind, uint8 [k, H, W, C]: 'clean', and 'triggered' with an attack.
        labels: True labels, int32 [k].
        target_map: Target label for each true label, int32 [K]; None without an attack.
        class_names: Names of the K classes.
        predictions: Predicted labels by model and kind, int32 [k]; the first model first.
    """

    images: dict[str, np.ndarray]
    labels: np.ndarray
    target_map: np.ndarray | None
    class_names: tuple[str, ...]
    predictions: dict[str, dict[str, np.ndarray]]


def write_before_after(path: Path, examples: Examples, results: Results) -> None:
    """Draws the picture and writes it as a PNG file."""
    figure = draw(examples, results)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def draw(examples: Examples, results: Results) -> Any:
    """Draws the picture as a Matplotlib figure: the images on the left, bars of ACC and ASR on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 0.8 + 1.9 * len(examples.images)), layout='constrained')
    grid = figure.add_gridspec(1, 2, width_ratios=[COLUMNS, 3.4])
    left, right = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    axes = left.subplots(len(examples.images), len(examples.labels), squeeze=False)
    for row, kind in enumerate(examples.images):
        axes[row, 0].set_ylabel(kind, fontsize=11)
        for column, axis in enumerate(axes[row]):
            _draw_image(axis, examples, kind, column)
    colours = 'blue: the true label'
    if TRIGGERED in examples.images:
        colours += '; orange: the target label'
    title = f'{results.setting.dataset}, {_attack(results)}: predictions of each model ({colours})'
    left.suptitle(title, fontsize=11)
    _draw_bars(right, results)
    return figure


def choose(labels: np.ndarray, target_map: np.ndarray | None, count: int) -> np.ndarray:
    """Chooses the first test image of each class.

    Args:
        labels: True labels, int [N].
        target_map: Target label for each true label, int [K]; None without an attack. Images whose true label is the
            target label are not chosen.
        count: Largest number of images.

    Returns:
        Indices of the images, int.
    """
    eligible = labels != target_map[labels] if target_map is not None else np.ones(len(labels), bool)
    first = [np.flatnonzero(eligible & (labels == k))[:1] for k in np.unique(labels)]
    return np.concatenate(first)[:count]


def _draw_image(axis: Any, examples: Examples, kind: str, column: int) -> None:
    """Draws one image, and below it a line with the prediction of each model."""
    image, label = examples.images[kind][column], int(examples.labels[column])
    axis.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap='gray', vmin=0, vmax=255)
    axis.set_xticks([])
    axis.set_yticks([])
    target = int(examples.target_map[label]) if examples.target_map is not None else -1
    for line, (model, predictions) in enumerate(examples.predictions.items()):
        prediction = int(predictions[kind][column])
        axis.text(
            0.5,
            -0.05 - 0.16 * line,
            f'{model}: {examples.class_names[prediction][:14]}',
            transform=axis.transAxes,
            ha='center',
            va='top',
            fontsize=8.5,
            color=_colour(prediction, label, target),
        )


def _draw_bars(figure: Any, results: Results) -> None:
    models = results.models
    axis = figure.subplots()
    shares = [('acc', 'ACC', TRUE_COLOUR)] + ([('asr', 'ASR', TARGET_COLOUR)] if results.kind == 'infected' else [])
    height = 0.8 / len(shares)
    for i, (share, name, colour) in enumerate(shares):
        places = np.arange(len(models)) + (i - (len(shares) - 1) / 2) * height
        values = [100 * (scores.share(share) or 0.0) for scores in models.values()]
        bars = axis.barh(places, values, height * 0.9, color=colour, label=name)
        axis.bar_label(bars, fmt='%.1f', padding=2, fontsize=9)
    axis.set_yticks(range(len(models)), list(models))
    axis.set_xlim(0, 118)
    axis.set_xticks([0, 50, 100])
    axis.invert_yaxis()
    axis.spines[['top', 'right']].set_visible(False)
    axis.set_xlabel('percent of test images')
    figure.legend(loc='outside upper center', ncols=2, frameon=False)


def _colour(prediction: int, label: int, target: int) -> str:
    if prediction == label:
        return TRUE_COLOUR
    return TARGET_COLOUR if prediction == target else OTHER_COLOUR


def _attack(results: Results) -> str:
    match results.kind:
        case 'benign':
            return 'no attack'
        case 'given':
            return 'trigger unknown'
    return f'{results.setting.attack} ({results.setting.label_mode})'
