"""nanovllm bench: workload draws requests, drive serves them, limits computes how fast they could be served at best.

scenarios starts the engine, session measures on it, report shows the Result. commands/bench.py is the command.
"""
