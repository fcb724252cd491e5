"""The triton backend: the launchers of the Triton kernels in kernels/."""
