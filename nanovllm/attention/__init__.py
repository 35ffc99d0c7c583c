"""Attention over the paged KV cache: the backend interface, its three implementations and the selection."""
