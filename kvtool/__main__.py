"""`python -m kvtool`."""

from kvtool.app import main

if __name__ == "__main__":
    main()
