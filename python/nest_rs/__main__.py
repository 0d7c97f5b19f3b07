"""`python -m nest_rs`."""

import sys

from nest_rs.cli import main

sys.exit(main())
