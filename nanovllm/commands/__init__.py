"""One module a command of `nanovllm`: add_parser(commands) declares it, run(arguments) returns its exit code."""
