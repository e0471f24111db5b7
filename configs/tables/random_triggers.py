"""Triggers that nobody chose: 60 random draws, with which nothing was tuned, on Fashion-MNIST and the small network.

    python -m aft_jax.sweep --config=configs/tables/random_triggers.py --workdir=runs/random
    python -m aft_jax.sweep --config=configs/tables/random_triggers.py:tune --workdir=runs/random_tune

The first command uses the draws 1000 to 1059. The second one uses the draws 0 to 39, which are there for finding
recipes. Each draw has a trigger (`aft_jax.attacks.random_trigger`), and also a poisoning rate of 1 to 10 %, a target
label, and all-to-all target labels in one of five cases. A model whose ASR is below 80 % before any defense does not
count. A benign control is part of either table.

Beside the tables of every sweep there are distribution.csv and distribution.png, with the ASR that is left: its median,
90th percentile and worst, by family of triggers. draws.csv has a row for each trigger.
"""

import math

import numpy as np

from aft_jax.config import table_config
from configs import fashion_mnist

DRAWS = {'test': range(1000, 1060), 'tune': range(40)}
ALL_TO_ALL = 0.2
POISONED_SHARES = 0.01, 0.1


def draw_config(draw):
    """Builds the experiment of one draw."""
    generator = np.random.default_rng([draw, 26])
    config = fashion_mnist.get_config('random')
    config.attack.random.seed = draw
    config.attack.label_mode = 'all2all' if generator.random() < ALL_TO_ALL else 'all2one'
    config.attack.poisoned_share = round(math.exp(generator.uniform(*np.log(POISONED_SHARES))), 4)
    config.attack.target = int(generator.integers(10))
    return config


def get_config(split='test'):
    experiments = {f'draw{draw}': draw_config(draw) for draw in DRAWS[split]}
    experiments['none'] = fashion_mnist.get_config('none')
    return table_config(
        experiments, label_modes='own', seeds=(0,), defenses='ft,fp,anp,fst,aft_released,aft_universal,aft'
    )
