"""Planners: kernels that cut a step into work items on the GPU, and the same in plain Python."""
