"""What is learned and how: policies, losses, the inner update, meta-gradients, outer optimizers."""

from metarl.learning import settings as settings  # they are put back after user code
