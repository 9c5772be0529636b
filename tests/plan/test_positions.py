"""Positions are ranks again, with pooled tables' rows at their owners."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from recjax.frequency import Profile
from recjax.plan import positions
from recjax.plan.plan import Plan


@st.composite
def cases(draw):
  """(plan, profile) with some tables pooled; runs of one table, and mixes."""
  rng = np.random.default_rng(draw(st.integers(0, 2**32)))
  tables = draw(st.integers(1, 5))
  runs = rng.integers(1, draw(st.sampled_from([2, 40])), 60)
  table = np.repeat(rng.integers(0, tables, 60), runs).astype(np.int16)
  rows, n = len(table), draw(st.sampled_from([1, 2, 3, 8]))
  hot, end = sorted(rng.integers(0, rows + 1, 2).tolist())
  if draw(st.booleans()):
    end = rows
  spare = n * draw(st.sampled_from([0, 0, 1, 30])) if hot < end else 0
  count = draw(st.integers(1, tables))
  pooled = rng.permutation(tables)[:count]
  plan = Plan(
    devices=n,
    batch_size=n,
    rows=rows + spare,
    dim=1,
    dtype="float32",
    hot=hot,
    warm_end=end + spare,
    capacity_warm=1,
    capacity_cold=1,
    pooled=tuple((f"t{t}", int(rng.integers(n))) for t in pooled),
    spare=spare,
  )
  names = tuple(f"t{t}" for t in range(tables))
  return plan, Profile(1, names, np.ones(rows, np.int64), table)


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from([1, 7, 1 << 20]))
def test_positions(case, block):
  plan, profile = case
  positions.of.cache_clear()
  before, positions._SLICE = positions._SLICE, block
  try:
    where = positions.of(plan, profile)
  finally:
    positions._SLICE = before
  ranks = np.arange(profile.rows, dtype=np.int32)
  at = where.positions_of(ranks)
  assert at.dtype == np.int32
  end, n = plan.warm_end - plan.spare, plan.devices

  # Tiers keep their rows, and there is one position a row.
  np.testing.assert_array_equal(at[: plan.hot], ranks[: plan.hot])
  np.testing.assert_array_equal(at[end:], ranks[end:] + plan.spare)
  warm = at[plan.hot : end]
  assert len(np.unique(at)) == len(at)
  assert np.all((warm >= plan.hot) & (warm < plan.warm_end))
  np.testing.assert_array_equal(where.positions_of(np.array([-1])), [-1])
  np.testing.assert_array_equal(at[::-1], where.positions_of(ranks[::-1]))

  # The inverse, in pieces as well.
  back = where.ranks_of(0, plan.rows)
  np.testing.assert_array_equal(back[at], ranks)
  assert np.count_nonzero(back < 0) == plan.spare
  middle = plan.rows // 2
  np.testing.assert_array_equal(
    where.ranks_of(middle, plan.rows), back[middle:]
  )

  # Owners have their tables' hottest rows, and no room is left beyond them.
  owner = (warm - plan.hot) % n
  room = np.array([len(range(o, plan.warm, n)) for o in range(n)])
  owner_of = {profile.tables.index(t): o for t, o in plan.pooled}
  wanted = [owner_of.get(t, -1) for t in profile.table[plan.hot : end]]
  for o in range(n):
    own = np.flatnonzero(np.equal(wanted, o))
    fits = min(len(own), room[o])
    assert np.all(owner[own[:fits]] == o)
    mine = warm[owner == o]
    assert len(mine) <= room[o]
    assert np.all(np.diff(mine) > 0)  # hottest first
    if not plan.spare:
      assert len(mine) == room[o]

  # The others take turns: nobody takes a row while another has fewer, and room.
  count = [np.count_nonzero(np.equal(wanted, o)) for o in range(n)]
  left, taken = room - np.minimum(count, room), np.zeros(n, int)
  kept = np.minimum(count, room)
  seen = np.zeros(n, int)
  for o, want in zip(owner, wanted, strict=True):
    if want >= 0 and seen[want] < kept[want]:
      seen[want] += 1
      continue
    assert taken[o] == min(taken[taken < left])
    taken[o] += 1


def test_without_pooled_tables_nothing_moves():
  plan = Plan(2, 2, 9, 1, "float32", 1, 8, 1, 1)
  profile = Profile(1, ("t",), np.ones(9, np.int64), np.zeros(9, np.int16))
  assert positions.of(plan, profile) is None
  assert positions.from_ranks(plan, profile) is None
  assert positions.warm_ranks(plan, profile) is None
