"""The table of all config fields, in their order: default, meaning and rule of each."""

from typing import Any

from aft_jax.config.attack import ATTACK
from aft_jax.config.defenses import DEFENSES
from aft_jax.config.fields import (
    BELOW_ONE,
    NOT_NEGATIVE,
    OPEN_SHARE,
    POSITIVE,
    POSITIVE_SHARE,
    Field,
    between,
    each,
    list_of,
    one_of,
)
from aft_jax.data import BUILTIN
from aft_jax.models import NAMES
from aft_jax.models.resnet import STEMS

STAGES = ('scan', 'infect', 'purify', 'report')
DTYPES = ('float32', 'bfloat16')
LARGEST_SIDE = 4096

DATA = {
    'dir': Field('', "Folder of prepared TFDS data sets; '' is the default of TFDS."),
    'idx_dir': Field('', "Folder of Fashion-MNIST's four IDX .gz files."),
    'size': Field(0, 'Side in pixels to which images are resized; 0 keeps their size.', between(0, LARGEST_SIDE)),
    'pad': Field(0, 'Pixels of black added on every side.', between(0, LARGEST_SIDE)),
    'rgb': Field(False, 'Whether grey images are repeated to three channels.'),
    'bgr': Field(False, 'Whether colour images are fed as blue, green, red.'),
    'classes': Field(
        '',
        "Order of the classes of a folder: data set: '' is that of the folder names as text, 'numeric' that of their "
        'numbers, and a file has their names or {name: index}.',
    ),
    'test_share': Field(0.2, 'Share held out for the test in a folder: data set without a split.', OPEN_SHARE),
}
AUGMENT = {
    'crop': Field(0, 'Largest random shift in pixels.', NOT_NEGATIVE),
    'flip': Field(False, 'Whether images are flipped at random; not for digits, letters or signs.'),
    'rotation': Field(0.0, 'Largest random rotation in degrees.', NOT_NEGATIVE),
}
MODEL = {
    'name': Field(
        'mnist_cnn',
        f'Network: {", ".join(NAMES)}. A name such as preact_resnet34 sets the depth too. With init_from, '
        "'' takes the network of the file.",
    ),
    'factory': Field('', "Function 'package.module:function' that builds your own Flax module, in place of name."),
    'torch': Field(
        '',
        "PyTorch network in place of name: 'torchvision:NAME', 'timm:NAME', or your own function "
        "'package.module:function' that returns a torch.nn.Module. With options: "
        "'torchvision:vit_b_16(image_size=32)'.",
    ),
    'depth': Field(18, 'Layers. preact_resnet and resnet: 18, 34 or 50; vgg_bn: 11, 13, 16 or 19.'),
    'width': Field(64, 'Channels of the first stage; not for mnist_cnn.', POSITIVE),
    'final_norm': Field(False, 'preact_resnet: whether BatchNorm and ReLU come before the pooling.'),
    'stem': Field('cifar', 'resnet: cifar (3x3) or imagenet (7x7, stride 2, and a max pool).', one_of(*STEMS)),
    'pool_size': Field(7, 'vgg_bn: side of the averages that the dense layers see.', POSITIVE),
    'hidden': Field(4096, 'vgg_bn: units of each hidden dense layer.', POSITIVE),
    'conv_bias': Field(True, 'mnist_cnn: whether the two inner convolutions have biases.'),
    'dropout': Field(0.3, 'mnist_cnn and vgg_bn: dropout rate.', BELOW_ONE),
    'mean': Field((0.5,), 'Pixel mean of the normalisation, one value or one a channel.'),
    'std': Field((0.25,), 'Pixel deviation of the normalisation, one value or one a channel.', each(POSITIVE)),
}
TRAIN = {
    'epochs': Field(20, 'Epochs of the training that infects.', POSITIVE),
    'learning_rate': Field(0.01, 'Learning rate.', POSITIVE),
    'schedule': Field('cosine', 'Learning rate schedule.'),
    'momentum': Field(0.9, 'Momentum of SGD, for the defenses too.', BELOW_ONE),
    'weight_decay': Field(5e-4, 'Weight decay of SGD, for the defenses too.', NOT_NEGATIVE),
}
TUNING = {
    'held_out_share': Field(0.2, "Share of the defender's clean images that is held out.", OPEN_SHARE),
    'budget': Field(0.02, 'Accuracy on the held-out images that a candidate may lose.', NOT_NEGATIVE),
}
SCAN = {
    'steps': Field(120, 'Steps of the search for triggers.', POSITIVE),
    'factor': Field(2.0, 'Size of its changes of a purified model, in multiples of the largest of AFT.', POSITIVE),
    'factor_before': Field(0.5, 'The same for the first model.', POSITIVE),
    'images': Field(16, 'Images of a step, for each change.', POSITIVE),
}
SAFETY = {
    'trust_images': Field(False, 'Whether to go on with clean images that the given model gets wrong.'),
    'find_tainted': Field(True, 'Whether images that look tainted are left out of the clean ones.'),
    'largest_loss': Field(
        0.05,
        'Accuracy on held-out clean images that a model may lose to be exported; FT is then tried too.',
        NOT_NEGATIVE,
    ),
    'export_anyway': Field(
        False, 'Whether to export a model that lost more, or that was purified with doubtful images.'
    ),
}
# None of these changes a result. They may differ when a run is resumed.
RUN = {
    'placement': Field('auto', "Place of the training data; 'auto' is the devices if it fits on them."),
    'steps_per_call': Field(0, 'Training steps in one compiled call; 0 chooses by backend.', NOT_NEGATIVE),
    'log_every': Field(50, 'Steps between two lines of metrics.jsonl.', POSITIVE),
    'checkpoint_every': Field(500, 'Steps between two checkpoints.', POSITIVE),
    'keep_checkpoints': Field(2, 'Checkpoints that are kept of a stage.', POSITIVE),
    'evaluate_every': Field(0.0, 'Epochs between evaluations while infecting; 0 for the end alone.', NOT_NEGATIVE),
    'purify_points': Field(0, "Test evaluations in each defense, for the report's curves; 0 for none.", NOT_NEGATIVE),
    'eval_batch_size': Field(500, 'Batch size of the evaluation.', POSITIVE),
    'compile_cache': Field('', "Directory that keeps compiled programs for the next start; '' for none."),
}
FIELDS: dict[str, Any] = {
    'seed': Field(0, 'Seed of all randomness.', between(0, 2**32 - 1, '2**32 - 1')),
    'stages': Field(
        ('infect', 'purify', 'report'), "Stages to run; with init_from: 'scan', 'purify', 'report'.", list_of(*STAGES)
    ),
    'init_from': Field(
        '',
        'Model to purify in place of infecting one: a .pt, .pth, .pt2 or .safetensors file, or the work directory of a '
        "run. Its trigger is unknown, so attack.name must be 'none'.",
    ),
    'init_mapping': Field('', 'JSON file that maps unusual names of weights (see aft_jax/interchange).'),
    'init_logits': Field(
        '',
        'File .npz with images and the logits of the original code, for a check that the network is the same.',
    ),
    'dataset': Field('mnist5k', f'Data set: {", ".join(BUILTIN)}, npz:PATH or folder:PATH.'),
    'data': DATA,
    'augment': AUGMENT,
    'model': MODEL,
    'dtype': Field('float32', 'Type of the computation; parameters and statistics are float32.', one_of(*DTYPES)),
    'batch_size': Field(128, 'Images in a batch, over all devices.', POSITIVE),
    'train': TRAIN,
    'attack': ATTACK,
    'defenses': Field('ft,aft', 'Defenses to run on the infected model.'),
    'clean_share': Field(
        0.05, 'Clean images of the defender, a share of the training set; 1 only with init_from.', POSITIVE_SHARE
    ),
    # Every defense with candidates chooses by one rule: the strongest within the budget.
    'tuning': TUNING,
    **DEFENSES,
    'scan': SCAN,
    'safety': SAFETY,
    'run': RUN,
}
