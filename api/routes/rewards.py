"""The route /rewards: the reward functions."""

from __future__ import annotations

from typing import Any

from litestar import Request, Response, get
from litestar.params import FromQuery

from api.auth import ANY_SCOPE
from api.fields import Fields
from api.lists import Cursor, Limit, answer, page_of
from api.problems import responses
from api.schemas import Reward, RewardList, reward_of
from grpo_core.rewards import RewardMode, describe


@get(
    "/rewards",
    operation_id="listRewards",
    summary="The reward functions",
    tags=["rewards"],
    opt=ANY_SCOPE,
    responses=responses("bad_query", "unknown_field"),
    sync_to_thread=False,
)
def list_rewards(
    request: Request[Any, Any, Any],
    mode: FromQuery[RewardMode | None] = None,
    limit: Limit = None,
    cursor: Cursor = None,
    fields: Fields = None,
) -> Response[RewardList]:
    """The reward functions, in both modes or in one."""
    modes: tuple[RewardMode, ...] = (mode,) if mode else ("fixed", "published")
    every = list(enumerate(info for each in modes for info in describe(each)))
    found, following = page_of(every, lambda each: each[0], limit=limit, cursor=cursor)
    page = RewardList(
        data=[reward_of(info) for _, info in found], has_more=following is not None, next_cursor=following
    )
    return answer(request, page, fields, Reward)
