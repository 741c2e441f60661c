"""`python -m mla_cute`, the same as the command `mla-cute`."""

from .cli import main

if __name__ == "__main__":
    main()
