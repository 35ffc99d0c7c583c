"""One file a kernel: the kernel and its launcher. Imports torch and triton (or flash_attn) only."""
