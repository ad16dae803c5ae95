"""`edgetube` and `python -m edgetube`: a signal that comes while modules are imported ends the process quietly."""

from __future__ import annotations

from typing import NoReturn

from edgetube import interrupts


def main() -> NoReturn:
    """Run the command line of `sys.argv`."""
    interrupts.leave_at_once()
    from edgetube import cli

    cli.main()


if __name__ == "__main__":
    main()
