"""What the core asks of every offer. The dist must be installed: the suite finds it as a user's program does."""

from __future__ import annotations

from tensorway.testing import OfferSuite


class TestOffer(OfferSuite):
    kind = "transport"
    name = "procmem"
    #: Import names of your library, for the test that importing the plugin does not load it.
    native_modules = ()
