"""``python -m attnrobust`` is the command ``attnrobust``."""

from attnrobust.cli import main

if __name__ == "__main__":
    main()
