"""The `skynet` command: parse, call one library function, print. No logic."""
