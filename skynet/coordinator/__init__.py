"""Decides: membership, planner, scheduler, state store."""
