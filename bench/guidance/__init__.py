"""Benchmarks of hasten.guidance."""
