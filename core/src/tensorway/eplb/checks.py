"""What a session refuses before its fabric sees a number.

Room `eplb`; may import the rooms below.
"""

from __future__ import annotations

from tensorway.eplb.contract import Fetch, Group, Send
from tensorway.eplb.layout import ExpertLayout
from tensorway.eplb.staging import Staging
from tensorway.errors import MemoryInvalid, PlacementInvalid


def check_move(subject: Fetch | Send, group: Group, layout: ExpertLayout, staging: Staging) -> None:
    """Raise `PlacementInvalid` or `MemoryInvalid` if a rank, layer, slot or row of it does not exist."""
    asked = f"Slots {list(subject.slots)} of layer {subject.layer} were to be moved from or to rank {subject.peer}."
    if not 0 <= subject.peer < len(group.members) or subject.peer == group.me:
        true = f"The others of {group.path} in epoch {group.epoch} are {list(group.others)}."
        raise PlacementInvalid(asked, true, "Give ranks of the group, never global ones.")
    slots_exist = not subject.slots or (min(subject.slots) >= 0 and max(subject.slots) < layout.slots)
    if not slots_exist or not 0 <= subject.layer < len(layout.layers) or subject.cycle < 0:
        true = f"There are {len(layout.layers)} layers of {layout.slots} slots, and cycles are counted from 0."
        raise PlacementInvalid(asked, true, "Give what a plan for this layout says.")
    if isinstance(subject, Fetch):
        rows = subject.rows
        if len(rows) != len(subject.slots) or (rows and (min(rows) < 0 or max(rows) >= staging.rows)):
            true = f"They were to arrive in rows {list(rows)} of {staging.rows}, and each slot needs one."
            raise MemoryInvalid(asked, true, "Lease the rows from the staging that the session was given.")
