"""Writes golden/ivon.npz: five steps of the authors' package ivon-opt (PyPI) with noise drawn here.

The test environment has neither torch nor ivon-opt: pip install torch ivon-opt, then python tests/record_ivon.py. The
problem is logistic regression in float64. The file holds the batches, the noise, and the weights and Hessians after
every step.
"""

from pathlib import Path
from unittest import mock

import ivon
import numpy as np
import torch

SETTINGS = {'lr': 0.4, 'ess': 60.0, 'hess_init': 0.5, 'beta1': 0.8, 'beta2': 0.9, 'weight_decay': 0.03}
CASES = {'plain': {'clip_radius': float('inf'), 'mc_samples': 1}, 'clipped': {'clip_radius': 0.1, 'mc_samples': 2}}


def main():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 12, 3)), rng.integers(0, 2, size=(5, 12)).astype(float)
    w, noise = rng.normal(size=3), rng.normal(size=(5, 2, 3))
    recorded = {'x': x, 'y': y, 'w': w, 'noise': noise}
    for name, case in CASES.items():
        params = torch.nn.Parameter(torch.tensor(w))
        optimizer = ivon.IVON([params], **SETTINGS, **case)
        weights, hessians = [], []
        for t in range(5):
            for sample in range(case['mc_samples']):
                drawn = mock.patch('torch.randn', return_value=torch.tensor(noise[t, sample]))
                with drawn, optimizer.sampled_params(train=True):
                    optimizer.zero_grad()
                    scores = torch.tensor(x[t]) @ params
                    torch.nn.functional.binary_cross_entropy_with_logits(scores, torch.tensor(y[t])).backward()
            optimizer.step()
            weights.append(params.detach().numpy().copy())
            hessians.append(optimizer.param_groups[0]['hess'].numpy().copy())
        recorded |= {f'{name}_params': np.array(weights), f'{name}_hessian': np.array(hessians)}
    np.savez(Path(__file__).parent / 'golden' / 'ivon.npz', **recorded)


if __name__ == '__main__':
    main()
