"""Public benchmarks with and without vltok's methods, run by lmms-eval."""
