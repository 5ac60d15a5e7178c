"""``python -m russet``, for where the command ``russet`` is not on the path."""

from russet.cli import main

if __name__ == "__main__":
    main()
