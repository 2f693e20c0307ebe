"""`python -m jax_causal_conv`: what a bug report needs; see `doctor`."""

import argparse
import sys

from . import doctor

_DESCRIPTION = """\
Says which implementation runs on this machine and why, compiles the Triton kernels
(and on an NVIDIA GPU runs them and compares them with XLA), and names known troubles
with their cures. The report is what a bug report should contain."""
_EXIT_STATUS = """\
exit status:
  0  what this machine has works. A machine without a GPU is one of these: XLA runs.
  1  jax cannot start, or there is an NVIDIA GPU on which the kernels fail: the report
     says why, under "troubles".
  2  the command line is wrong."""


def main() -> int:
    """Prints the report; the exit status is that of `doctor.exit_status`."""
    argparse.ArgumentParser(
        prog="python -m jax_causal_conv",
        description=_DESCRIPTION,
        epilog=_EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    facts = doctor.collect()
    troubles = doctor.diagnose(facts)
    print(doctor.render(facts, troubles))
    return doctor.exit_status(troubles)


if __name__ == "__main__":
    sys.exit(main())
