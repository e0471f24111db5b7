"""The defaults of every config field, in one place. A config file starts from these and changes what it needs."""

from typing import Any, TypeVar

import ml_collections
from ml_collections import config_dict

from aft_jax.models import COMBINED

Options = TypeVar('Options', bound=tuple)
# The defenses that are AFT: the configured one, and the authors' own beside it.
AFT_SECTIONS = ('aft', 'aft_released')
# What an AFT preset stands for; a field that the config leaves empty is taken from here.
AFT_PRESETS: dict[str, dict[str, Any]] = {
    # The authors' released code: 3 of 20 epochs on adversarial examples, the rest on clean images.
    'released': {
        'norm': 'linf',
        'eps': 6 / 255,
        'step_size': 6 / 255 / 5,
        'universal': '',
        'per_image': '',
        'rms_eps': 0.0,
        'sparse_share': 0.0,
        'warp_share': 0.0,
        'renew_every': 1,
        'pgd_steps': 7,
        'random_start': False,
        'clip': False,
        'epochs': 20,
        'adversarial_epochs': 3.0,
        'adversarial_share': 1.0,
        'adversarial_weight': 1.0,
        'distillation': 0.0,
        'cutmix': 0.0,
        'recalibrate': False,
        'learning_rate': 1e-3,
        'schedule': 'constant',
        'max_grad_norm': 0.0,
    },
    # Ours: changes that the images of a batch share, and changes of each image's own, and clean predictions held by
    # distillation on clean images with parts of others.
    'default': {
        'norm': 'linf',
        'eps': 20 / 255,
        'step_size': 5 / 255,
        'universal': 'linf,l2,sparse,warp',
        'per_image': 'linf,l2,sparse',
        'rms_eps': 0.11,
        'sparse_share': 0.015,
        'warp_share': 0.036,
        'renew_every': 100,
        'pgd_steps': 4,
        'random_start': True,
        'clip': True,
        'epochs': 40,
        'adversarial_epochs': 38.0,
        'adversarial_share': 0.4375,
        'adversarial_weight': 1.5,
        'distillation': 16.0,
        'cutmix': 1.0,
        'recalibrate': True,
        'learning_rate': 0.08,
        'schedule': 'cosine',
        'max_grad_norm': 1.0,
    },
}
# The same for a clean set of a few hundred images, where an epoch is a step or two.
AFT_PRESETS['small'] = AFT_PRESETS['default'] | {'epochs': 120, 'adversarial_epochs': 114.0}


def default_config() -> ml_collections.ConfigDict:
    """Returns every field with its default value.

    Images are in [0, 1] wherever a budget or an amplitude is given: 8/255, not 8.
    """
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.stages = ('infect', 'purify', 'report')  # with init_from: 'scan', 'purify', 'report'

    # A model that is there already, in place of one that is infected here: a .pt, .pth or .safetensors file, or the
    # work directory of a finished run. Nothing is known of its trigger, so attack.name must be 'none'.
    config.init_from = ''
    config.init_mapping = ''  # JSON file of keys that have unusual names (see aft_jax/interchange)

    config.dataset = 'mnist5k'
    config.data = ml_collections.ConfigDict(
        {
            'dir': '',  # where TFDS keeps prepared sets; '' is its own default
            'idx_dir': '',  # a folder with Fashion-MNIST's four IDX .gz files
            'size': 0,  # resize to size x size; 0 leaves the images alone
            'pad': 0,  # pixels of black added on every side
            'rgb': False,  # grey images repeated to three channels
            'test_share': 0.2,  # held out of a folder: set that has no split of its own
        }
    )
    config.augment = ml_collections.ConfigDict(
        {
            'crop': 0,  # random shift by at most so many pixels
            'flip': False,  # random horizontal flip; not for digits, letters or signs
            'rotation': 0.0,  # random rotation by at most so many degrees
        }
    )

    config.model = ml_collections.ConfigDict(
        {
            # One of models.NAMES; 'preact_resnet34' and the like set the depth too. '' takes what init_from holds.
            'name': 'mnist_cnn',
            'factory': '',  # 'package.module:function' that makes a Flax module of your own, in place of name
            'depth': 18,  # preact_resnet and resnet: 18, 34 or 50; vgg_bn: 11, 13, 16 or 19
            'width': 64,  # all but mnist_cnn: channels of the first stage
            'final_norm': False,  # preact_resnet: BatchNorm and ReLU before the pooling
            'stem': 'cifar',  # resnet: 'cifar' (3x3) or 'imagenet' (7x7, stride 2, and a max pool)
            'pool_size': 7,  # vgg_bn: the dense layers see pool_size x pool_size averages
            'hidden': 4096,  # vgg_bn: units of each hidden dense layer
            'conv_bias': True,  # mnist_cnn: biases of the two inner convolutions
            'dropout': 0.3,  # mnist_cnn and vgg_bn
            'mean': (0.5,),  # pixel normalisation, one value or one a channel
            'std': (0.25,),
        }
    )
    config.dtype = 'float32'  # of the computation; parameters and statistics stay float32
    config.batch_size = 128
    config.train = ml_collections.ConfigDict(
        {
            'epochs': 20,
            'learning_rate': 0.01,
            'schedule': 'cosine',
            'momentum': 0.9,
            'weight_decay': 5e-4,
        }
    )

    config.attack = ml_collections.ConfigDict(
        {
            'name': 'badnets',
            'label_mode': 'all2one',
            'target': 0,  # all2one: the label that the trigger commands
            'poisoned_share': 0.1,
            'poisoning': 'fixed',
            'badnets': {'pattern': '001/010/101', 'row': -1, 'column': -1},
            'blend': {'alpha': 0.1, 'pattern_path': ''},
            'sig': {'delta': 20 / 255, 'frequency': 6.0, 'clean_label': False},
            # cross_ratio: images in noise mode for each triggered one
            'wanet': {'grid': 4, 'strength': 0.5, 'cross_ratio': 2.0},
            # Trained along with the classifier, whatever `poisoning` says.
            'input_aware': {
                'cross_ratio': 1.0,  # images with another one's trigger for each triggered one
                'mask_epochs': 25.0,
                'mask_learning_rate': 0.01,
                'mask_density': 0.032,  # share of the image that the mask may cover at no cost
                'mask_weight': 100.0,
                'mask_diversity_weight': 1.0,
                'generator_learning_rate': 0.01,
                'diversity_weight': 1.0,
            },
        }
    )

    config.defenses = 'ft,aft'
    config.clean_share = (
        0.05  # of the training set's size: what the defender holds; with init_from up to all of it, 1.0
    )
    # How a defense that has to choose tells its candidates apart: on a part of its clean images, by one rule for all.
    config.tuning = ml_collections.ConfigDict(
        {
            'held_out_share': 0.2,  # of the defender's clean images
            'budget': 0.02,  # of accuracy on them; the strongest candidate within it is taken
        }
    )
    # Of these, from the weakest to the strongest, `tuning` takes one; a single one trains on all clean images.
    rates = (0.01, 0.03, 0.1)
    config.ft = ml_collections.ConfigDict(
        {'epochs': 40, 'learning_rates': rates, 'schedule': 'cosine', 'max_grad_norm': 1.0}
    )
    config.nad = ml_collections.ConfigDict(
        {
            'teacher_epochs': 10,
            'epochs': 40,
            'learning_rates': rates,  # of teacher and student
            'schedule': 'cosine',
            'max_grad_norm': 1.0,  # 0 for no bound
            'betas': (500.0, 1000.0, 1000.0),  # of the last stages, the last for the last
        }
    )
    config.mcr = ml_collections.ConfigDict(
        {
            'endpoint_epochs': 40,  # of the fine-tuned end of the curve
            'epochs': 40,
            'learning_rate': 0.1,  # a candidate near 0 leads back to the suspect where that was too much
            'schedule': 'cosine',
            'max_grad_norm': 1.0,
            'candidates': (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),  # places on the curve
        }
    )
    config.fp = ml_collections.ConfigDict(
        {'epochs': 40, 'learning_rates': rates, 'schedule': 'cosine', 'max_grad_norm': 1.0}
    )
    config.anp = ml_collections.ConfigDict(
        {
            'iterations': 2000,
            'eps': 0.4,  # of the noise, a share of a BatchNorm's scales and biases
            'clean_weight': 0.2,  # of the loss without noise; the rest is that with noise
            'learning_rate': 0.2,  # of the masks
        }
    )
    config.pbe = ml_collections.ConfigDict(
        AFT_PRESETS['default']  # the rounds after the first
        | {
            'first_share': 0.05,  # of the suspect training set, in the first round
            'first_epochs': 10,  # of that round, all of them on adversarial examples alone
            'first_learning_rate': 0.1,
            'keep': (0.2, 0.5, 0.7),  # the most consistent share of every label, in each further round
            'epochs': 4,  # of each further round
            'adversarial_epochs': 4.0,
            'recalibrate': False,
        }
    )
    config.aft = aft_options('default')
    # Beside it in a table, on the same infected model.
    config.aft_released = aft_options('released')

    # How a run is carried out; none of it changes a result, and it may differ when a run is resumed.
    config.run = ml_collections.ConfigDict(
        {
            'placement': 'auto',  # of the training data: 'device', 'host', or 'auto': on the devices where they fit
            'steps_per_call': 0,  # training steps in one compiled call; 0 chooses by backend
            'log_every': 50,  # steps
            'checkpoint_every': 500,  # steps
            'keep_checkpoints': 2,  # a stage
            'evaluate_every': 0.0,  # epochs, or parts of one, between evaluations while infecting; 0 only at the end
            'purify_points': 0,  # evaluations on the test set in each stage of a defense, for the report alone; 0 none
            'eval_batch_size': 500,
            'compile_cache': '',  # a directory where compiled programs are kept from one start to the next
        }
    )
    return config


def aft_options(preset: str) -> ml_collections.ConfigDict:
    """Returns the fields of AFT, each empty until `resolve` takes it from the preset."""
    return ml_collections.ConfigDict(
        {
            'preset': preset,
            'norm': config_dict.placeholder(str),  # 'linf' or 'l2', of PGD
            'eps': config_dict.placeholder(float),
            'step_size': config_dict.placeholder(float),
            # In place of PGD, kinds of changes that images share, and of each one's own: of 'linf,l2,sparse,warp'
            'universal': config_dict.placeholder(str),
            'per_image': config_dict.placeholder(str),
            'rms_eps': config_dict.placeholder(float),  # l2: root mean square over pixels (linf takes eps)
            'sparse_share': config_dict.placeholder(float),  # sparse: of the pixels, which are set to 0 or 1
            'warp_share': config_dict.placeholder(float),  # warp: of the side, by which a pixel may be shifted
            'renew_every': config_dict.placeholder(int),  # steps, after which shared changes begin anew
            'pgd_steps': config_dict.placeholder(int),
            'random_start': config_dict.placeholder(bool),
            'clip': config_dict.placeholder(bool),
            'epochs': config_dict.placeholder(int),
            'adversarial_epochs': config_dict.placeholder(float),
            'adversarial_share': config_dict.placeholder(float),  # of a batch
            'adversarial_weight': config_dict.placeholder(float),  # of their loss
            'distillation': config_dict.placeholder(float),
            'cutmix': config_dict.placeholder(
                float
            ),  # largest share of a clean image that another one takes; 0 for none
            'recalibrate': config_dict.placeholder(bool),  # BatchNorm statistics of clean images, at the end
            'learning_rate': config_dict.placeholder(float),
            'schedule': config_dict.placeholder(str),
            'max_grad_norm': config_dict.placeholder(float),
        }
    )


def resolve(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns a frozen-in copy of `config` in which every value is set: presets and names with a depth filled in.

    The presets of `config.aft` and `config.aft_released` must be among AFT_PRESETS.
    """
    resolved = ml_collections.ConfigDict(config.to_dict())
    for name in AFT_SECTIONS:
        options = resolved[name]
        for field, value in AFT_PRESETS[options.preset].items():
            if options[field] is None:
                options[field] = value
    if resolved.model.name in COMBINED:
        resolved.model.name, resolved.model.depth = COMBINED[resolved.model.name]
    if resolved.model.factory:
        resolved.model.name = resolved.model.factory
    return resolved


def table_config(
    experiments: dict[str, ml_collections.ConfigDict],
    label_modes: str = 'all2one,all2all',
    seeds: tuple[int, ...] = (0, 1, 2),
    stages: tuple[str, ...] = ('infect', 'purify', 'report'),
    defenses: str = 'ft,aft',
    select: str = '',
) -> ml_collections.ConfigDict:
    """Returns the config of a table; without `select` all experiments are in it."""
    return ml_collections.ConfigDict(
        {
            'experiments': experiments,
            'select': select or ','.join(experiments),
            'label_modes': label_modes,
            'seeds': seeds,
            'stages': stages,
            'defenses': defenses,
        }
    )


def as_options(kind: type[Options], section: ml_collections.ConfigDict) -> Options:
    """Converts a section of a resolved config to a NamedTuple, which is hashable and typed.

    Args:
        kind: NamedTuple whose fields are all fields of the section. The section may have more. A field that is itself
            a NamedTuple takes its own fields from the same section.
        section: Section of the config.
    """
    values = {
        name: as_options(field, section) if hasattr(field, '_fields') else section[name]
        for name, field in kind.__annotations__.items()
    }
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def split_names(text: str) -> list[str]:
    """Splits a comma-separated list such as 'aft, ft' into names, each of them once."""
    return list(dict.fromkeys(name.strip() for name in text.split(',') if name.strip()))
