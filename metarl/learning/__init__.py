"""What is learned and how: policies, losses, the inner update, meta-gradients, outer optimizers."""
