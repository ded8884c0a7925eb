"""Recipes of earlier schemas, brought up to date as JSON values before their types are checked.

Schema 2 knew plans as published alone. Schemas 2 and 3 named three stacks in their fields, as the families then known
call them, and skipped layers of the first alone.
"""

from __future__ import annotations

from typing import Any

from flashu_compile.tasks import MMU, T2I, TASKS

SCHEMAS = (2, 3)
_AS_PUBLISHED = 2
_STACKS = {"ffn_pruning": "llm", "semantic_pruning": "semantic", "head_pruning": "head"}
#: The fields that the parameters of a task had, if not all three.
_FIELDS = {T2I.name: tuple(_STACKS), MMU.name: ("ffn_pruning", "semantic_pruning")}


def bring_up_to_date(data: dict[str, Any], schema: int) -> None:
    """Change a recipe of an earlier schema to what the present one calls it. What is malformed stays, to be refused."""
    data.setdefault("decoder", _STACKS["ffn_pruning"])
    for task in TASKS:
        config = data.get(task, {})
        if isinstance(config, dict):
            _name_stacks(config, _FIELDS.get(task, ("ffn_pruning",)))
    if schema == _AS_PUBLISHED and isinstance(t2i := data.setdefault(T2I.name, {}), dict):
        t2i.setdefault("as_published", True)
    decisions = data.get("decisions")
    for decided in decisions.values() if isinstance(decisions, dict) else ():
        phases = decided.get("phases") if isinstance(decided, dict) else None
        for phase in phases if isinstance(phases, list) else ():
            if isinstance(phase, dict):
                phase["skipped"] = {_STACKS["ffn_pruning"]: phase.get("skipped", [])}


def _name_stacks(config: dict[str, Any], fields: tuple[str, ...]) -> None:
    pruning = {_STACKS[field]: config.pop(field) for field in fields if field in config}
    if pruning:
        config["pruning"] = pruning
    if "layer_skipping" in config:
        config["layer_skipping"] = {_STACKS["ffn_pruning"]: config["layer_skipping"]}
