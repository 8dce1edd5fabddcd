"""`python -m tensorway`: the command line."""

from __future__ import annotations

import sys

from tensorway.cli import main

sys.exit(main())
