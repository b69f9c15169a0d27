"""Measures and compares: tasks, metrics, PSCP, sweeps, reports and the command line."""
