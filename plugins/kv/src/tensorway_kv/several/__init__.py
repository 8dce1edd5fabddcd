"""The connector `several`: others behind one planner and one mover, in an order, with what each one is for."""

from __future__ import annotations
