"""The ranks' process group, collectives and messages.

Importing this package imports torch so that OpenMP's threads sleep while they wait (see omp_wait_policy). It must be
the first import of torch in the process, so executor/ imports this package before others that import torch.
"""

from nanovllm.omp_wait_policy import passive_omp_wait

with passive_omp_wait():
    import torch as torch
