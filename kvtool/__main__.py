"""`python -m kvtool`."""

import os
import sys

if __name__ == "__main__":
    # Python looks for modules in the folder that one stands in, before all others: a numba.py, or
    # a package's metadata, beside a model. Only a checkout that is not installed needs it, itself.
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):  # Python 3.11's -P, and -I
        here = os.path.realpath(sys.path.pop(0))
        if here == os.path.dirname(os.path.dirname(os.path.realpath(__file__))):
            sys.path.append(here)

    from kvtool.app import main

    main()
