"""Where a worker's weights come from: cache, local copy, hub, other nodes; every chunk verified. See `store.py`."""
