"""What the GPU backends share: the device, small constant tensors, and the kernels for mass and head gain."""
