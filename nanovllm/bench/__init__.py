"""nanovllm bench: workload draws requests, drive serves them, limits says how fast they could be served at best.

session measures scenarios and makes a Result, which report shows. commands/bench.py is the command.
"""
