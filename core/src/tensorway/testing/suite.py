"""What every suite shares: the contract's tests cannot be lost by accident.

Room `testing`. A suite is a class of tests; an author's subclass inherits them. Python lets a subclass replace a test
without a word, and then a report says "passed" about something that was never run; here that is a failure.
"""

from __future__ import annotations

import re
from typing import ClassVar, Final

#: Modules that have suites: those of the kit, and of a movement's dist for a kind that only the movement knows.
_OURS: Final = re.compile(r"tensorway(_\w+)?\.testing\b")


class Suite:
    """Base of all suites."""

    #: Test name -> why the subclass replaces it. Shown in the conformance report.
    overridden: ClassVar[dict[str, str]] = {}

    def test_no_test_of_the_suite_is_replaced_without_a_reason(self) -> None:
        """Every test that the suite defines is the suite's own, or `overridden` says why not.

        *If this fails:* remove the method of that name from your class, or put its name and your reason into
        `overridden`.
        """
        suite = next(base for base in type(self).__mro__ if _OURS.match(base.__module__))
        replaced = {
            name
            for name in dir(suite)
            if name.startswith("test_") and getattr(type(self), name, None) is not getattr(suite, name)
        }
        unexplained = {name for name in replaced if not self.overridden.get(name, "").strip()}
        assert set() == unexplained, f"replaced without a reason: {', '.join(sorted(unexplained))}"
