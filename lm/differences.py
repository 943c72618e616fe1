"""In what two configs differ, and which differences a run can be continued with."""

from __future__ import annotations

import dataclasses
from typing import Any

from lm.config import RunConfig


def differences(saved: RunConfig, wanted: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The fields, by dotted name, in which two configs differ: {name: (saved, wanted)}."""
    old, new = flat(saved), flat(wanted)
    return {name: (old[name], new[name]) for name in old if old[name] != new[name]}


def forbidden_on_resume(saved: RunConfig, wanted: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The differences that a run can't be continued with: all that would change its numbers or its arrays."""
    found = differences(saved, wanted)
    free = {name for name in found if name.startswith(("parallel.", "checkpoint.", "evaluation.", "observe."))}
    free |= {"model.attention", "model.scan_layers", "model.remat", "data.loader_threads", "data.tokenizer_processes"}
    free.add("training.max_skipped_steps")
    old, new = saved.training.steps, wanted.training.steps
    if old is not None and new is not None and new > old:
        free.add("training.steps")
    return {name: values for name, values in found.items() if name not in free}


def flat(config: RunConfig) -> dict[str, Any]:
    """All fields by dotted name."""
    found: dict[str, Any] = {}
    for section, fields in dataclasses.asdict(config).items():
        found |= (
            {f"{section}.{name}": value for name, value in fields.items()}
            if isinstance(fields, dict)
            else {section: fields}
        )
    return found
