"""Learning: losses, the inner update, advantages, meta-gradients and outer optimizers."""
