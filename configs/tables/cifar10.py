"""Five attacks and a benign control, both label modes, three seeds, on CIFAR-10 with PreActResNet18.

    python -m aft_jax.sweep --config=configs/tables/cifar10.py --workdir=runs/cifar10 --shard=0/4

The experiments are those of configs/cifar10.py. They need accelerators.
"""

from aft_jax.config import table_config
from configs import cifar10


def get_config():
    return table_config({attack: cifar10.get_config(attack) for attack in cifar10.ATTACKS})
