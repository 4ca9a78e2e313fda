"""Loss functions: plain functions of tensors, each with its source."""
