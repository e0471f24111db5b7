"""Five attacks and a benign control, both label modes, three seeds, on all of Fashion-MNIST with the small network.

    python -m aft_jax.sweep --config=configs/tables/fashion_mnist.py --workdir=runs/table

The experiments are those of configs/fashion_mnist.py. On one core, a seed takes about 80 minutes to infect, half of
them for the input-aware attack. It takes 130 minutes to purify, of which PBE takes 45. --shard=0/2 and 1/2 share the
work. The recipes of the defenses were chosen with other seeds than these.
"""

from aft_jax.config import table_config
from configs import fashion_mnist


def get_config():
    return table_config(
        {attack: fashion_mnist.get_config(attack) for attack in fashion_mnist.ATTACKS},
        select='badnets,blend,sig,wanet,input_aware,none',
        seeds=(3, 4, 5),
        defenses='ft,fp,mcr,nad,anp,aft_released,aft,pbe',
    )
