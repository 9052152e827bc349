"""Which classes the outputs of a network stand for: their names, since a number alone tells no two data sets apart.

A `.beton` file's manifest has them; from there they go into checkpoints, converted and exported files.
"""

from __future__ import annotations

from collections.abc import Sequence

#: Names that are shown of a longer list.
SHOWN = 5


def difference(
    theirs: Sequence[str] | None,
    ours: Sequence[str] | None,
    of_theirs: str = "the checkpoint",
    of_ours: str = "the data",
) -> str:
    """How the classes of two things differ, in words; empty where they are the same, or one of them has no names."""
    if theirs is None or ours is None or list(theirs) == list(ours):
        return ""
    alone = {of_theirs: _without(theirs, ours), of_ours: _without(ours, theirs)}
    if any(alone.values()):
        return "; ".join(f"only {who} has {_some(names)}" for who, names in alone.items() if names)
    if len(theirs) != len(ours):
        return f"{of_theirs} has {len(theirs)} classes, {of_ours} {len(ours)} of the same names"
    at = next(i for i, (one, other) in enumerate(zip(theirs, ours, strict=True)) if one != other)
    return f"the same names in another order, class {at} is {theirs[at]} in {of_theirs} and {ours[at]} in {of_ours}"


def require_same(
    theirs: Sequence[str] | None, ours: Sequence[str] | None, *, checkpoint: str, data: str, then: str
) -> None:
    """Raise ValueError where a checkpoint's classes are not those of the data, by name and order.

    Args:
        theirs, ours: of the checkpoint and of the data; None where they have no names.
        checkpoint, data: what the error calls them.
        then: what to do.
    """
    if differing := difference(theirs, ours):
        raise ValueError(f"{checkpoint} is of other classes than {data}: {differing}. {then}")


def _without(names: Sequence[str], others: Sequence[str]) -> list[str]:
    known = set(others)
    return [name for name in names if name not in known]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
