"""``python -m commfuse``: the command line."""

from commfuse.cli import main

if __name__ == "__main__":
    main()
