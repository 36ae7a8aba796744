"""What Alembic runs: migrations on the connection, and in the transaction, from `service.database.migrate`."""

from alembic import context

from service.database.schema import Row

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=Row.metadata,
    # SQLite changes a table by rebuilding it, and then loses the DESC of ix_jobs_claim: a migration that rebuilds the
    # jobs makes that index again (the test that compares the migrated schema with the declared one shows it).
    render_as_batch=True,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
