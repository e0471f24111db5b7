"""Five attacks and a benign control, all2one, one seed, on 32x32x3 input with a narrow PreActResNet18, for a CPU.

    python -m aft_jax.sweep --config=configs/tables/preact_resnet.py --workdir=runs/preact-table

The experiments are those of configs/preact_resnet.py. FT has half of its usual epochs, and one learning rate, the
largest of its candidates.
"""

from aft_jax.config import table_config
from configs import preact_resnet


def get_config():
    table = table_config(
        {attack: preact_resnet.get_config(attack) for attack in preact_resnet.ATTACKS},
        label_modes='all2one',
        seeds=(0,),
        defenses='ft,aft_released,aft',
    )
    for experiment in table.experiments.values():
        experiment.ft.epochs = 20
        experiment.ft.learning_rates = (0.1,)
    return table
