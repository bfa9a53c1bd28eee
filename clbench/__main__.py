"""`python -m clbench`: run experiments."""

import sys


def main() -> None:
    """Entry point of `python -m clbench` and of the `clbench` command; Ctrl-C is one line while it is imported, too."""
    try:
        from clbench import cli
    except KeyboardInterrupt:
        print("clbench: interrupted; the same command continues", file=sys.stderr)
        raise SystemExit(130) from None
    cli.main()


if __name__ == "__main__":
    main()
