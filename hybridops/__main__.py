"""`python -m hybridops`: the same as the console script `hybridops`."""

import sys

from .cli import main

sys.exit(main())
