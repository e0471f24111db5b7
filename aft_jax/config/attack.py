"""The fields of `config.attack`: which backdoor is planted, and how."""

from typing import Any

from aft_jax.config.fields import (
    BELOW_ONE,
    IN_PIXELS,
    NOT_NEGATIVE,
    OPEN_SHARE,
    POSITIVE,
    POSITIVE_SHARE,
    Field,
    at_least,
)

ATTACK: dict[str, Any] = {
    'name': Field('badnets', "Attack that infects the model; 'none' trains a benign model."),
    'label_mode': Field('all2one', 'Target labels: one class for all images, or the next class for each class.'),
    'target': Field(0, 'Target label of all2one.', at_least(0)),
    'poisoned_share': Field(0.1, 'Poisoning rate: share of the training images with a trigger.', OPEN_SHARE),
    'poisoning': Field('fixed', 'Poisoned images: chosen once, or drawn again in every batch.'),
    'badnets': {
        'pattern': Field('001/010/101', 'Rows of the patch from the top; 0 is black and 1 is white.'),
        'row': Field(-1, "Row of the patch's first pixel; -1 puts the patch at the lower edge."),
        'column': Field(-1, "Column of the patch's first pixel; -1 puts the patch at the right edge."),
    },
    'blend': {
        'alpha': Field(0.1, 'Weight of the pattern in a triggered image.', POSITIVE_SHARE),
        'pattern_path': Field('', "Picture file of the pattern; '' draws uniform noise from the seed."),
    },
    'sig': {
        'delta': Field(20 / 255, 'Amplitude of the sine wave, for pixels in [0, 1].', IN_PIXELS),
        'frequency': Field(6.0, 'Periods of the sine wave across the image.'),
        'clean_label': Field(False, 'Whether only images of the target class are poisoned, with their own label.'),
    },
    'random': {
        'seed': Field(0, 'Seed of the drawn trigger; the same trigger for every seed of the experiment.', NOT_NEGATIVE),
    },
    'wanet': {
        'grid': Field(4, 'Control points of the warping field, a side.', at_least(2)),
        'strength': Field(0.5, 'Strength of the warp (s in the paper).', POSITIVE),
        'cross_ratio': Field(2.0, 'Images in noise mode for each triggered image.', POSITIVE),
    },
    # The trigger generator is trained with the classifier. `poisoning` has no influence.
    'input_aware': {
        'cross_ratio': Field(1.0, "Images with another image's trigger for each triggered image.", POSITIVE),
        'mask_epochs': Field(25.0, 'Epochs in which the mask network is trained first.', POSITIVE),
        'mask_learning_rate': Field(0.01, 'Learning rate of the mask network.', POSITIVE),
        'mask_density': Field(0.032, 'Share of the image that the mask may cover without a penalty.', BELOW_ONE),
        'mask_weight': Field(100.0, "Weight of the penalty on the mask's size.", POSITIVE),
        'mask_diversity_weight': Field(1.0, 'Weight of the diversity loss of the masks.', NOT_NEGATIVE),
        'generator_learning_rate': Field(0.01, 'Learning rate of the trigger generator.', POSITIVE),
        'diversity_weight': Field(1.0, 'Weight of the diversity loss of the triggers.', NOT_NEGATIVE),
    },
}
