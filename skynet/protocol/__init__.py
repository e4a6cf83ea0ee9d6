"""What crosses a wire and who may send it. Of ours it imports errors.py alone."""
