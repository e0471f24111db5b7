"""Five attacks and a benign control, both label modes, three seeds, on all of Fashion-MNIST with the small network.

    python -m aft_jax.sweep --config=configs/tables/fashion_mnist.py --workdir=runs/table

The experiments are those of configs/fashion_mnist.py.
"""

from aft_jax.grid import table_config
from configs import fashion_mnist


def get_config():
    return table_config({attack: fashion_mnist.get_config(attack) for attack in fashion_mnist.ATTACKS})
