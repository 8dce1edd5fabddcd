"""The waist: one contract for moving blocks of registered memory, whatever the fabric.

Room `transport`; may import the ground. `contract` says what movements may ask and what a fabric must do, `Endpoint`
makes a transport of a fabric, and `local` is the one that is always there.
"""

from __future__ import annotations

from tensorway.transport.blocks import BlockTable
from tensorway.transport.contract import Capabilities, Fabric, Notification, Peer, Route, Transport
from tensorway.transport.endpoint import Endpoint
from tensorway.transport.transfer import State, Transfer

__all__ = [
    "BlockTable",
    "Capabilities",
    "Endpoint",
    "Fabric",
    "Notification",
    "Peer",
    "Route",
    "State",
    "Transfer",
    "Transport",
]
