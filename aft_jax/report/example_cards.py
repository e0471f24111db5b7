"""Cards of the page: a test image of each kind with the predictions of the models, and the trigger on an image."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from aft_jax.analysis.observation import ADVERSARIAL, CLEAN, TRIGGERED, Observation
from aft_jax.report.trigger_gallery import MAGNIFICATION, magnified_difference
from aft_jax.results.record import percent

# Larger images are scaled down for the page; pixels.
LARGEST_SIDE = 128
# Signs before a prediction.
MARKS = {'true': '✓', 'target': '⚑', 'other': '≠'}


def trigger(observation: Observation, i: int, class_names: tuple[str, ...]) -> dict[str, Any]:
    """Makes the card that shows the trigger on image `i`: clean, triggered, and their difference."""
    clean, triggered = observation.images[CLEAN][i], observation.images[TRIGGERED][i]
    name = class_names[observation.labels[i]]
    difference = np.abs(triggered.astype(int) - clean.astype(int))
    changed = percent(float(np.mean(difference.max(axis=-1) > 0)))
    summary = f'changes {changed} of the pixels, by {difference.max()} of 255 at most'
    pictures = [
        (CLEAN, clean, f'A clean image of class {name}.'),
        (TRIGGERED, triggered, f'The same image with the trigger, which {summary}.'),
        (
            f'difference ×{MAGNIFICATION}',
            magnified_difference(clean, triggered),
            f'The difference, magnified {MAGNIFICATION} times about grey: the trigger {summary}.',
        ),
    ]
    shown = [{'kind': kind, 'source': encode_png(image), 'alt': alt, 'answers': []} for kind, image, alt in pictures]
    return {'name': name, 'pictures': shown}


def example(observation: Observation, i: int, models: Sequence[str], class_names: tuple[str, ...]) -> dict[str, Any]:
    """Makes the card that shows image `i` of each kind, with the prediction of each model.

    All models predict the same adversarial image, which was made on the first model.
    """
    label = int(observation.labels[i])
    target = int(observation.target_map[label]) if observation.target_map is not None else -1
    pictures = []
    for kind, images in observation.images.items():
        answers = []
        for model in models:
            transferred = kind == ADVERSARIAL
            own = observation.outputs[model].predictions
            prediction = int((observation.transferred[model] if transferred else own[kind])[i])
            mark = 'true' if prediction == label else 'target' if prediction == target else 'other'
            answers.append({'model': model, 'prediction': class_names[prediction], 'mark': mark})
        predictions = ', '.join(f'{a["model"]} predicts {a["prediction"]}' for a in answers)
        alt = f'{kind.capitalize()} image of class {class_names[label]}: {predictions}.'
        pictures.append({'kind': kind, 'source': encode_png(images[i]), 'alt': alt, 'answers': answers})
    return {'name': class_names[label], 'pictures': pictures}


def encode_png(image: np.ndarray) -> str:
    """Encodes an image, uint8 [H, W, C], as a data: address."""
    from PIL import Image

    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, 'PNG', optimize=True)
    return f'data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'
