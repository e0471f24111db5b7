"""Writes values.npz, what torch makes of the small cases, for machines without torch.

PYTHONPATH=.:tests python tests/parity/make_values.py
"""

from pathlib import Path

import cases
import numpy as np
import torch_reference

PATH = Path(__file__).parent / 'values.npz'

if __name__ == '__main__':
    values = torch_reference.values(cases.STORED_NETWORKS)
    np.savez_compressed(PATH, **values)
    print(
        f'{PATH}: {len(values)} arrays, {PATH.stat().st_size / 1e3:.0f} kB, torch {torch_reference.torch.__version__}'
    )
