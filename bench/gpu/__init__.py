"""One command for a bare GPU machine: checks of every kernel, microbenchmarks, steps, decoding and memory."""
