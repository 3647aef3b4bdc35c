"""The schema's common ground: one MetaData, portable column shapes, the database's own clock."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

metadata = sa.MetaData()

BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def clean(text: str) -> str:
    """Text from outside as every back end can keep it: no NUL (PostgreSQL), no lone surrogate (UTF-8)."""
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def insert(conn: Connection, table: sa.Table) -> Any:
    """The dialect's INSERT, which knows `on_conflict_do_nothing`."""
    return sqlite.insert(table) if conn.dialect.name == "sqlite" else postgresql.insert(table)


def database_now_ms(conn: Connection) -> int:
    """Unix milliseconds by the database's clock, the one that leases use."""
    if conn.dialect.name == "sqlite":
        sql = "SELECT CAST((julianday('now')-2440587.5)*86400000 AS INTEGER)"
    else:
        sql = "SELECT CAST(extract(epoch from clock_timestamp())*1000 AS bigint)"
    return int(conn.exec_driver_sql(sql).scalar_one())
