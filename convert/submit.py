"""What spark-submit runs: `python -m convert --engine spark`, with the arguments it is given."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # A script finds its neighbours first: `record`, `split` and so on would hide other modules.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

    from convert.__main__ import main

    sys.argv[1:1] = ["--engine", "spark"]
    sys.exit(main())
