"""A lane that is wanted has a pane whose worker lives; one that died is started again only where nobody stopped it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import sqlalchemy as sa

from bot.fleet.lanes import Lanes, LaneState, Shown, TmuxError
from bot.fleet.probes import MendError, Probe, Reach, failing, fine, untold
from bot.models import UserError
from bot.snapshot import Finding, ProbeVerdict
from bot.store import lanes as rows


async def look(reach: Reach) -> Sequence[Finding]:
    """The lanes of this host; without one tmux is not asked."""
    wanted = await reach.store.read(lambda conn: conn.execute(sa.select(rows.c.lane).limit(1)).first())
    if wanted is None or reach.lanes is None:
        return []
    try:
        return [judge(lane) for lane in await reach.lanes.shown()]
    except (TmuxError, UserError) as error:
        return [untold("tmux", str(error))]


def judge(lane: Shown) -> Finding:
    """As it is wanted against as it is seen."""
    target, evidence = f"lane {lane.row.lane}", {"wanted": lane.row.wanted, "state": lane.state.value, "restarts": lane.row.restarts}
    if lane.well:
        stopped = f", stopped by {lane.row.by}" if lane.row.wanted == rows.DOWN else ""
        return fine(target, f"{lane.state.value}{stopped}", **evidence)
    if lane.row.wanted == rows.DOWN:
        return fine(target, "it is on its way down", **evidence)
    status = "" if lane.pane is None or lane.pane.dead_status is None else f" with {lane.pane.dead_status}"
    return replace(failing(target, f"its worker {lane.state.value}{status}", **evidence), mendable=True)


async def mend(reach: Reach, finding: Finding) -> str:
    """Starts the worker again."""
    lanes = _lanes(reach)
    try:
        lane = next((lane for lane in await lanes.shown() if judge(lane).target == finding.target), None)
        if lane is None or judge(lane).verdict is ProbeVerdict.OK:
            raise MendError("it is well again, or not wanted any more")
        if lane.pane is not None and lane.state is LaneState.ENDED:
            started = await lanes.restart(lane.pane)
        else:
            started = lane.row.lane in await lanes.mend(patient=False)
    except (TmuxError, UserError) as error:
        raise MendError(str(error)) from None
    if not started:
        raise MendError("it was not started: somebody stopped it, the fleet is paused, or `lanes.restart` says never")
    return "its worker was started again"


def _lanes(reach: Reach) -> Lanes:
    if reach.lanes is None:
        raise MendError("this process does not look after lanes")
    return reach.lanes


plugin = Probe(
    "workers in the panes of tmux", look, period_seconds=30.0, mend=mend, does="starts the lane's worker again", distance_seconds=60.0
)
