"""The route /rewards: the reward functions."""

from __future__ import annotations

from litestar import get
from litestar.params import FromQuery

from api.auth import ANY_SCOPE
from api.problems import responses
from api.schemas import RewardList, reward_of
from grpo_core.rewards import RewardMode, describe


@get(
    "/rewards",
    operation_id="listRewards",
    summary="The reward functions",
    tags=["rewards"],
    opt=ANY_SCOPE,
    responses=responses("bad_query"),
    sync_to_thread=False,
)
def list_rewards(mode: FromQuery[RewardMode | None] = None) -> RewardList:
    """The reward functions, in both modes or in one."""
    modes: tuple[RewardMode, ...] = (mode,) if mode else ("fixed", "published")
    return RewardList(data=[reward_of(info) for each in modes for info in describe(each)])
