"""`lightning-hesd`, also as `python -m lightning_hesd`: the command line, if what it needs is installed."""

import sys

from lightning_hesd.commands.errors import missing_dependency


def main() -> None:
    """Run the command line with the arguments of this process."""
    try:
        from lightning_hesd.commands import cli  # noqa: PLC0415 - its dependencies are optional
    except ModuleNotFoundError as error:
        sys.exit(missing_dependency(error))
    cli.main()


if __name__ == "__main__":
    main()
