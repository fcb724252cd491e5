"""The tiny FLUX.1-Fill that comes with the package: its training data, its training, and how to call it."""
