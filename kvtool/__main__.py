"""``python -m kvtool`` is ``kvtool``."""

import sys

from kvtool.cli import main

sys.exit(main())
