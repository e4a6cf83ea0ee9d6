"""Runs the migrations on the connection, and in the transaction, that `database.py` hands over."""

from alembic import context

from skynet.coordinator.store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,  # SQLite can't alter tables in place
)
with context.begin_transaction():
    context.run_migrations()
