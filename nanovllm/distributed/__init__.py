from nanovllm.omp_wait_policy import passive_omp_wait

with passive_omp_wait():  # a worker process imports this package before torch
    import torch as torch
