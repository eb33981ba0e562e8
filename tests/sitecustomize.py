"""Python imports this at its start where tests are on PYTHONPATH: see rounding.py."""

import os

if os.environ.get("ROUNDING_NOISE"):
    from rounding import install

    install(int(os.environ["ROUNDING_NOISE"]))
