"""A stage that has commands beside it: `ballast restore lox ...` is a command, `ballast restore CONFIG` the stage."""

from typing import Any

from typer.core import TyperGroup

STAGE = "stage"  # the command that a configuration stands for


class StageOrCommand(TyperGroup):
    """A group in which a first word that is no command's name is a configuration, whose stage is run."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Put the stage's command in front of a configuration."""
        known = not args or args[0].startswith("-") or self.get_command(ctx, args[0]) is not None
        return super().resolve_command(ctx, args if known else [STAGE, *args])
