"""Kernels, one operation per file. The torch function is the definition; a Triton twin is loaded when it is used."""
