"""The cpu backend: fused C++ kernels from csrc/cpu, called through their C interface."""
