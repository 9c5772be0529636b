"""Positions are ranks again, with table-wise rows at their tables' owners."""

import helpers
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recjax.frequency import Profile
from recjax.plan import positions
from recjax.plan.plan import WARM, Plan
from recjax.schema import Feature, columns_of


def drawn_group(draw, rng, name, tables, rows, n, some):
  """A group with random cuts; `some`: tables of it are table-wise."""
  hot, end = sorted(rng.integers(0, rows + 1, 2).tolist())
  if draw(st.booleans()):
    end = rows
  padding = n * draw(st.sampled_from([0, 0, 1, 30])) if some else 0
  if hot == end:
    padding, some = 0, False  # no tier for them
  count = int(rng.integers(1, len(tables) + 1)) if some else 0
  chosen = [tables[i] for i in rng.permutation(len(tables))[:count]]
  return helpers.make_group(
    n,
    rows,
    hot,
    end - hot,
    name=name,
    tables=tuple(tables),
    dim=1,
    capacity=1,
    table_wise=tuple((t, int(rng.integers(n))) for t in chosen),
    padding_rows=padding,
  )


@st.composite
def cases(draw):
  """(plan, profile): one to three groups; runs of one table, and mixes."""
  rng = np.random.default_rng(draw(st.integers(0, 2**32)))
  groups = draw(st.integers(1, 3))
  names = [f"t{t}" for t in range(draw(st.integers(groups, 5)))]
  runs = rng.integers(1, draw(st.sampled_from([2, 40])), 60)
  table = np.repeat(rng.integers(0, len(names), 60), runs).astype(np.int16)
  n = draw(st.sampled_from([1, 2, 3, 8]))
  # Each group has one table at least, in no order; the others go anywhere.
  group_of = np.append(np.arange(groups), rng.integers(0, groups, 5))
  group_of = rng.permutation(group_of[: len(names)])
  made = []
  for g in range(groups):
    mine = np.flatnonzero(group_of == g)
    rows = int(np.isin(table, mine).sum())
    some = draw(st.booleans()) or groups == 1
    tables = [names[t] for t in rng.permutation(mine)]
    made.append(drawn_group(draw, rng, f"g{g}", tables, rows, n, some))
  plan = Plan(n, n, tuple(made))
  profile = Profile(1, tuple(names), np.ones(len(table), np.int64), table)
  return plan, profile


def of_groups(plan, profile, block):
  """positions.of_groups, with pieces of `block` rows."""
  positions._of_group.cache_clear()
  before, positions._SLICE = positions._SLICE, block
  try:
    return positions.of_groups(plan, profile)
  finally:
    positions._SLICE = before


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from([1, 7, 1 << 20]))
def test_positions(case, block):
  plan, profile = case
  found = of_groups(plan, profile, block)
  assert set(found) == {g.name for g in plan.groups if g.table_wise}
  for group in plan.groups:
    if group.table_wise:
      check_group(group, found[group.name], profile, plan.devices)


def check_group(group, where, profile, n):
  mine = profile.of_tables(group.tables)
  ranks = np.arange(mine.rows, dtype=np.int32)
  at = where.positions_of(ranks)
  assert at.dtype == np.int32
  tier, hot = group.tier(WARM), group.rows_of("hot")
  end = hot + tier.rows - group.padding_rows

  # Tiers keep their rows, and there is one position a row.
  np.testing.assert_array_equal(at[:hot], ranks[:hot])
  np.testing.assert_array_equal(at[end:], ranks[end:] + group.padding_rows)
  warm = at[hot:end]
  assert len(np.unique(at)) == len(at)
  assert np.all((warm >= hot) & (warm < tier.stop))
  np.testing.assert_array_equal(where.positions_of(np.array([-1])), [-1])
  np.testing.assert_array_equal(at[::-1], where.positions_of(ranks[::-1]))

  # The inverse, in pieces as well.
  back = where.ranks_of(0, group.rows)
  np.testing.assert_array_equal(back[at], ranks)
  assert np.count_nonzero(back < 0) == group.padding_rows
  middle = group.rows // 2
  np.testing.assert_array_equal(
    where.ranks_of(middle, group.rows), back[middle:]
  )
  for t in group.tiers:  # rank of a tier's first row, where it keeps them
    if t != tier:
      assert back[t.first] == group.first_rank(t)

  # Owners have their tables' hottest rows, and no room is left beyond them.
  owner = (warm - hot) % n
  room = np.array([len(range(o, tier.rows, n)) for o in range(n)])
  owner_of = {mine.tables.index(t): o for t, o in group.table_wise}
  wanted = [owner_of.get(t, -1) for t in mine.table[hot:end]]
  for o in range(n):
    own = np.flatnonzero(np.equal(wanted, o))
    fits = min(len(own), room[o])
    assert np.all(owner[own[:fits]] == o)
    theirs = warm[owner == o]
    assert len(theirs) <= room[o]
    assert np.all(np.diff(theirs) > 0)  # hottest first
    if not group.padding_rows:
      assert len(theirs) == room[o]

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


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(0, 2**32))
def test_ids_of_a_batch_become_positions_of_their_groups(case, seed):
  """Each column by the group of its table, and back to the data's ranks."""
  plan, profile = case
  rng = np.random.default_rng(seed)
  features = tuple(
    Feature(f"f{i}", t, hotness=int(rng.integers(1, 4)))
    for i, t in enumerate(rng.permutation([*profile.tables] * 2).tolist())
  )
  columns = columns_of(features)
  ids = np.full((6, sum(f.hotness for f in features)), -1, np.int32)
  for f in features:
    rows = np.flatnonzero(profile.table == profile.tables.index(f.table))
    if len(rows):
      draw = rng.integers(-1, len(rows), (6, f.hotness))
      ids[:, columns[f.name]] = np.where(draw < 0, -1, rows[draw])

  before = ids.copy()
  where = positions.of_batches(plan, profile, features)
  if where is None:
    assert len(plan.groups) == 1
    assert not plan.groups[0].table_wise
    return
  got = where.of_batch(ids)
  np.testing.assert_array_equal(ids, before)  # batches may share memory
  assert (got.shape, got.dtype) == (ids.shape, np.int32)
  of_group = positions.of_groups(plan, profile)
  for group in plan.groups:
    # Ranks of the prepared data of the group's rows, in its rank order.
    indices = [profile.tables.index(t) for t in group.tables]
    ranks = np.flatnonzero(np.isin(profile.table, indices))
    back = np.arange(group.rows)
    if group.name in of_group:
      back = of_group[group.name].ranks_of(0, group.rows)
    for f in features:
      if f.table in group.tables:
        mine, want = got[:, columns[f.name]], ids[:, columns[f.name]]
        np.testing.assert_array_equal(mine < 0, want < 0)
        there = mine >= 0
        assert np.all(mine[there] < group.rows)
        np.testing.assert_array_equal(ranks[back[mine[there]]], want[there])


def test_two_groups_by_hand():
  """Rows of tables a b a b b a; b's group puts its first row past a hot one."""
  profile = Profile(
    1, ("a", "b"), np.ones(6, np.int64), np.int16([0, 1, 0, 1, 1, 0])
  )
  one = helpers.make_group(2, 3, 0, 3, name="one", tables=("a",))
  two = helpers.make_group(
    2, 3, 1, 2, name="two", tables=("b",), table_wise=(("b", 1),)
  )
  plan = Plan(2, 2, (one, two))
  features = Feature("x", "b", hotness=2), Feature("y", "a")
  where = positions.of_batches(plan, profile, features)
  ids = np.int32([[1, 3, 0], [4, -1, 5], [-1, 4, -1]])
  # b's ranks in its group are 0 (hot), 1 and 2; owner 1 has positions 2, 4, ...
  # of the warm ones, which begin at 1; there is room for one, so that rank 2
  # takes its turn at owner 0.
  want = [[0, 2, 0], [1, -1, 2], [-1, 1, -1]]
  np.testing.assert_array_equal(where.of_batch(ids), want)


def test_without_table_wise_tables_nothing_moves():
  plan = helpers.make_plan(2, 9, 1, 7, capacity=1)
  profile = Profile(1, ("t",), np.ones(9, np.int64), np.zeros(9, np.int16))
  assert positions.of_groups(plan, profile) == {}
  assert positions.of_batches(plan, profile, (Feature("f", "t"),)) is None


def test_a_table_without_a_group_is_an_error():
  plan = Plan(
    2,
    2,
    tuple(
      helpers.make_group(2, 9, 0, 9, name=name, tables=(name,)) for name in "ab"
    ),
  )
  profile = Profile(1, ("a", "c"), np.ones(9, np.int64), np.zeros(9, np.int16))
  with pytest.raises(ValueError, match="must be in one group"):
    positions.of_batches(plan, profile, (Feature("f", "a"),))
