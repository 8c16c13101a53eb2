"""`python -m optimum_prune prune ...` is `optimum-cli prune ...`."""

import sys

from optimum_prune.cli.early import PROGRAM
from optimum_prune.cli.main import main

sys.exit(main(sys.argv[1:], program=PROGRAM))
