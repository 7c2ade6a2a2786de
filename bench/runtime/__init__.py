"""Benchmarks of whole models, and the scripts that train the embedded ones."""
