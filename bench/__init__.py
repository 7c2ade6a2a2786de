"""Benchmarks: cases declared as data, one runner, the distance to what the machine allows."""
