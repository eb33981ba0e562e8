"""Run folders and their files."""

from metarl.envs.errors import UserError

try:
    import fcntl as fcntl  # locks run folders
    import resource as resource
except ImportError as error:
    import sys

    raise UserError(
        f"metarl runs on Linux and macOS, got {sys.platform}: on Windows, use WSL"
    ) from error
