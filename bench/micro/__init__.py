"""Microbenchmarks of every operator on the CPU, by pytest-benchmark; on a GPU it is `bench/gpu.sh --only micro`."""
