"""`python -m dit_ds.cli`."""

import sys

from dit_ds.cli.entry import main

sys.exit(main())
