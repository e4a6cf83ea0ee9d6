"""The HTTP gateway: APIs that existing clients speak. `gateway` is the entry, and imports FastAPI, which takes time."""
