"""What users may set about the policies that this dist brings. May import attrs alone: discovery reads it."""

from __future__ import annotations

from typing import Literal

import attrs


@attrs.frozen
class DeepseekOptions:
    """The options of the policy `deepseek`."""

    #: How many groups the experts are routed in; each group stays on one node. 1 where the model has none.
    num_groups: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    #: Pack groups to nodes first, or all experts at once; `auto` packs groups where they divide evenly among the nodes.
    mode: Literal["auto", "hierarchical", "global"] = attrs.field(
        default="auto", validator=attrs.validators.in_(("auto", "hierarchical", "global"))
    )
    #: Give each packed rank the number of the rank that already holds most of it: same balance, fewer rows to move.
    relabel: bool = False


@attrs.frozen
class IncrementalOptions:
    """The options of the policy `incremental`."""

    #: A layer whose slowest rank needs at most this share more than the ideal time is left as it is.
    tolerance: float = attrs.field(default=0.004, validator=[attrs.validators.ge(0), attrs.validators.lt(1)])
    #: A step that shortens the slowest rank's time by less than this share of the ideal time is not made.
    min_gain: float = attrs.field(default=0.0005, validator=[attrs.validators.ge(0), attrs.validators.lt(1)])
    #: A layer that would be faster by more than this share if it were packed anew is, if the budget has room for that.
    repack: float = attrs.field(default=0.03, validator=[attrs.validators.gt(0), attrs.validators.le(1)])
