"""The cuda backend: the Hopper kernel from csrc/cuda, called through its C interface."""
