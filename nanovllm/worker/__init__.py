"""Computes: everything that touches a device."""

from nanovllm.thread_waiting import sleeping_threads

with sleeping_threads():
    import torch as torch
