"""Models as pure functions of parameters."""

from metarl.models import settings as settings  # of torch; they are put back after user code
