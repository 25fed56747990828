"""What Ray says about the end of an actor, in few words."""

from __future__ import annotations

import re


def death_in_words(said: str) -> str:
    """Ray's paragraph about the end of an actor as one short phrase, with Ray's exit type where it names one."""
    exit_type = re.search(r"exit type: ([A-Z_]+)", said)
    text = said.lower()
    if "node" in text and ("node has died" in text or "node died" in text or "node was terminated" in text):
        words = "its node died"
    elif "memory usage threshold" in text or (exit_type and exit_type[1] == "NODE_OUT_OF_MEMORY"):
        words = "killed by Ray: its node ran out of memory"
    elif exit_type is not None and exit_type[1] == "SYSTEM_ERROR":
        words = "its process died (killed or crashed)"
    elif exit_type is not None:
        words = "its process ended"
    else:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        words = next((line for line in lines if "died" in line or "killed" in line), lines[0] if lines else "it died")
        words = words if len(words) <= 160 else words[:157] + "..."
    return f"{words} [{exit_type[1]}]" if exit_type else words
