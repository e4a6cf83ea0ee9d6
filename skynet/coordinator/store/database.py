"""Opening the database: private file, right pragmas, migrations, and errors that name the file and the fix."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

from skynet.errors import ConfigError
from skynet.protocol.private_files import private_dir

BUSY_TIMEOUT_S: Final = 5.0
_MIGRATIONS: Final = "skynet.coordinator.store:migrations"


class Database:
    """An engine with the schema of this version. `transaction` is the only way in."""

    def __init__(self, location: str | Path) -> None:
        self.name, url = _resolve(location)
        self._engine = _engine(url, self.name)
        try:
            self._migrate()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give every connection back. May be called twice."""
        self._engine.dispose()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """One short transaction: all of it happens, or nothing. Raises ConfigError naming the store and the fix."""
        try:
            with self._engine.begin() as connection:
                yield connection
        except (DBAPIError, sa.exc.TimeoutError) as exc:
            raise ConfigError(f"{self.name}: {_advice(exc)}") from exc

    def _migrate(self) -> None:
        config = Config()
        config.set_main_option("script_location", _MIGRATIONS)
        known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
        with self.transaction() as connection:
            if connection.dialect.name == "sqlite":
                found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
                if found != "ok":
                    found = " ".join(str(found).split())
                    raise ConfigError(f"{self.name}: damaged ({found}); restore a copy, or move it away to start anew")
            heads = set(MigrationContext.configure(connection).get_current_heads())
            if not heads and sa.inspect(connection).get_table_names():
                raise ConfigError(f"{self.name}: a database, but not SkyNet's; choose another place for the store")
            if not heads <= known:
                raise ConfigError(
                    f"{self.name}: written by a newer SkyNet (schema {', '.join(sorted(heads - known))}, this one "
                    f"knows up to {max(known)}); upgrade SkyNet, or choose another place for the store"
                )
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


def _resolve(location: str | Path) -> tuple[str, sa.URL]:
    """The name to use in errors, and the URL; a SQLite file is created with mode 0600 in a private directory."""
    if isinstance(location, Path):
        url = sa.URL.create("sqlite", database=str(location))
    else:
        try:
            url = sa.make_url(location)
        except ArgumentError as exc:
            raise ConfigError(f"{location!r}: isn't a database URL; expected one like sqlite:////dir/store.db") from exc
    if url.get_backend_name() != "sqlite":
        return url.render_as_string(hide_password=True), url
    if not url.database or url.database == ":memory:":
        raise ConfigError(
            "the store must be a file, since it has to survive a restart; expected sqlite:////dir/store.db"
        )
    path = Path(url.database)
    _create_private(path)
    return str(path), url


def _create_private(path: Path) -> None:
    private_dir(path.parent)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
    except OSError as exc:
        raise ConfigError(f"{path}: can't be opened: {exc.strerror}; choose another place for the store") from exc
    if os.name == "posix" and mode & 0o077:
        raise ConfigError(f"{path}: others may use it (mode {mode:04o}, expected 0600); chmod 600 {path}")


def _engine(url: sa.URL, name: str) -> sa.Engine:
    try:
        if url.get_backend_name() != "sqlite":
            return sa.create_engine(url, pool_pre_ping=True, pool_timeout=BUSY_TIMEOUT_S)
        engine = sa.create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S}, pool_timeout=BUSY_TIMEOUT_S)
    except (NoSuchModuleError, ModuleNotFoundError) as exc:
        raise ConfigError(f"{name}: no driver for this kind of database ({exc}); install it, or use SQLite") from exc
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver begins no transactions of its own; `_begin_sqlite` does
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: sa.Connection) -> None:
    # Take the write lock first: a transaction that reads and then writes can't be overtaken, or fail halfway.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _advice(exc: SQLAlchemyError) -> str:
    """What to do about a database error, in words."""
    seen = str(exc.orig if isinstance(exc, DBAPIError) else exc)
    lower = seen.lower()
    if "not a database" in lower or "malformed" in lower:
        return f"damaged or not a SkyNet store ({seen}); restore a copy, or move it away to start anew"
    if "locked" in lower or "timeout" in lower:
        return f"another process keeps it busy ({seen}); end that process"
    if "full" in lower:
        return f"can't be written ({seen}); free space"
    return f"failed ({seen}); check that the database can be reached and written"
