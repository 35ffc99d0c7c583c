"""Computes: everything that touches a device."""

from nanovllm.omp_wait_policy import passive_omp_wait

with passive_omp_wait():
    import torch as torch
