"""Models as pure functions of parameters."""

from metarl.models import settings as settings  # settings of torch, restored after user code
