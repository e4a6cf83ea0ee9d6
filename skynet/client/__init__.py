"""Asks: the swarm client."""
