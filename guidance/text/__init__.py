"""The law of constrained generation: constraints, exact draws and particles."""
