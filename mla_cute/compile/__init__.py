"""Compiled kernels: compiler, caches on disk and in memory, compiling ahead, and what a cubin says of itself."""
