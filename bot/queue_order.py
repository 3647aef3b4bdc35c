"""The order of the queue as SQL, in one place for all who read it: with SQLAlchemy, or without it where a start must be quick."""

from __future__ import annotations

# Equal to admitting head by head (engine.md, "Position").
QUEUE_ORDER = """
WITH flight AS (SELECT repo_id, count(*) AS n FROM sprints WHERE state NOT IN ('queued', 'settled') GROUP BY repo_id),
ranked AS (
  SELECT s.id, s.priority, s.queued_ms,
         coalesce(f.n, 0) + row_number() OVER (PARTITION BY s.repo_id ORDER BY s.priority, s.queued_ms, s.id) AS turn
  FROM sprints s LEFT JOIN flight f ON f.repo_id = s.repo_id WHERE s.state = 'queued')
SELECT id, row_number() OVER (ORDER BY priority, turn, queued_ms, id) AS place FROM ranked
"""
