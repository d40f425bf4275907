"""`python -m deq_jax` prints the environment for a bug report. Exit status 1: it is known not to work."""

import sys

from deq_jax._doctor import report

if __name__ == "__main__":
    text, problems = report()
    print(text)
    sys.exit(1 if problems else 0)
