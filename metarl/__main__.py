"""python -m metarl"""

import sys

from metarl.commands.cli import main

sys.exit(main())
