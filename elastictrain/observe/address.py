"""Where a run can be reached while it is under way: address.json in its run directory. Imports no Ray."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from elastictrain.errors import ConfigError
from elastictrain.observe.lines import replace_file

FILE = "address.json"


class Address(BaseModel):
    """`address`: host:port of the Ray cluster. `namespace`: of the run's actors. `auth_mode`: how the cluster asks who
    somebody is (RAY_AUTH_MODE): an embedded Ray asks for its user's token, which Ray itself looks up.
    """

    model_config = ConfigDict(frozen=True)

    address: str
    namespace: str
    auth_mode: str | None = None

    def write(self, folder: Path) -> None:
        """Raises ClusterError."""
        replace_file(folder / FILE, self.model_dump_json(exclude_none=True) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Address:
        """Raises ConfigError when the folder does not say it."""
        try:
            return cls.model_validate(json.loads((folder / FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            raise ConfigError(
                f"RUN {str(folder)!r}: it has no {FILE}, so it is not known where it runs; it has not started yet, or "
                "never did"
            ) from None
