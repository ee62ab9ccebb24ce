"""`python -m langchain_cogview.cli`: the `cogview` command."""

import sys

from langchain_cogview.cli import main

if __name__ == "__main__":
    sys.exit(main())
