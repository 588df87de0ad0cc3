"""`python -m peftjax` is the command line."""

import sys

from peftjax.cli import main

sys.exit(main())
