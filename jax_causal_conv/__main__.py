"""`python -m jax_causal_conv`: what a bug report needs; see `doctor`."""

import sys

from . import doctor


def main() -> int:
    """Prints the report; the exit status is 1 if the kernels fail on this GPU."""
    facts = doctor.collect()
    troubles = doctor.diagnose(facts)
    print(doctor.render(facts, troubles))
    return doctor.exit_status(troubles)


if __name__ == "__main__":
    sys.exit(main())
