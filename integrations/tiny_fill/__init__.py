"""The tiny FLUX.1-Fill that the package brings: its data, its training and its judge."""
