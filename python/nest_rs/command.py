"""What every command of the command line shares."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class Command(BaseModel):
    """A command: its fields are its flags."""

    json_output: bool = Field(False, alias="json", description="print machine-readable results on stdout")
    quiet: bool = Field(False, description="no progress messages")

    def run(self) -> Any:
        """Do the work; what is returned is printed with --json."""
        raise NotImplementedError

    def show(self, result: Any) -> None:
        """Print the result for a reader."""

    def status(self, result: Any) -> int:
        """The exit status."""
        return 0
