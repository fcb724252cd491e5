"""The registered operators, torch.ops.flashbrush.*: schemas, implementations, fakes."""
