"""`python -m pertoken` is `pertoken`."""

from pertoken.cli.commands import command

command()
