"""A state with an infinity or a NaN is never saved; the error names where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_checkpoint import (
  IDENTITY,
  PROFILE,
  TABLE,
  assert_same,
  fresh,
  in_rank_order,
  make_plan,
  restore,
  save,
  sums_of,
  train,
)

from recjax.errors import UserError
from recjax.training import checkpoint, row_checks
from recjax.training.state import At

NAN, INF = float("nan"), float("inf")


def put(run, tier, name, value):
  """Sets one number of a tier's array; returns (run, its position)."""
  arrays = run.state.tables["g"][tier]
  x = arrays.rows if name == "rows" else arrays.slots[name]
  at = (17,) + (3,) * (x.ndim - 1)
  x = x.at[at].set(value)
  if name == "rows":
    arrays = arrays._replace(rows=x)
  else:
    arrays = arrays._replace(slots=arrays.slots | {name: x})
  tiers = run.state.tables["g"] | {tier: arrays}
  state = run.state._replace(tables=run.state.tables | {"g": tiers})
  of = run.spec.embedding.plan.group("g").tier(tier)
  position = of.first + (17 * of.owners + 3 if of.axes else 17)
  return run._replace(state=state), position


def put_stored(run, tier, name, value):
  """The same of a tier of the host store."""
  stored = run.store.groups["g"]
  at = [t.name for t, _, _ in stored.tiers()].index(tier)
  part = stored.parts[at]
  x = part.rows if name == "rows" else part.slots[name]
  x[41] = value
  return run, int(stored.positions(np.array([stored.tiers()[at][1] + 41]))[0])


@pytest.mark.parametrize(
  ("tier", "name", "value"),
  [
    ("hot", "rows", INF),
    ("warm", "m", NAN),
    ("warm", "rows", -INF),
    ("cold", "rows", NAN),
    ("cold", "v", INF),
    ("frozen", "rows", -INF),
    ("frozen", "m", NAN),
  ],
)
def test_rows_that_are_not_finite_are_not_saved(tier, name, value, tmp_path):
  run = train(fresh("8_frozen", seed=3), 0, 1)
  want = in_rank_order(run)
  with checkpoint.manager(tmp_path, keep=1) as to:
    save(to, 1, run)
    to.wait_until_finished()
    where = put if tier in run.state.tables["g"] else put_stored
    run, position = where(run, tier, name, value)
    about = checkpoint.About(IDENTITY, At(5), sums_of(run), None, PROFILE)
    with pytest.raises(UserError) as e:
      checkpoint.save(to, 5, run, about)
      to.wait_until_finished()
  table = "tu"[TABLE[position]]
  row = f"the row of rank {position} in table {table}"
  what = row if name == "rows" else f"{name} of {row}"
  assert str(e.value).startswith(
    f"the state after step 5 is not finite ({what}) and is not saved; "
    f"checkpoint 1 in {tmp_path} is kept. Look at the data of the steps"
  )
  assert checkpoint.newest(tmp_path) == 1
  assert_same(in_rank_order(restore(tmp_path, "8_frozen", 1)), want)


@pytest.mark.parametrize("of", ["params", "opt_state"])
def test_a_dense_part_that_is_not_finite_is_not_saved(of, tmp_path):
  run = fresh("2_warm")
  parts = {"params": run.state.params, "opt_state": run.state.opt_state}
  whole = parts[of]
  break_ = lambda x: x.at[1, 2].set(NAN) if x.ndim else x
  parts[of] = jax.tree.map(break_, parts[of])
  assert parts[of] is not whole
  run = run._replace(state=run.state._replace(**parts))
  with checkpoint.manager(tmp_path) as to, pytest.raises(UserError) as e:
    save(to, 5, run)
  assert f"is not finite ({of}." in str(e.value)
  assert "w) and is not saved; there is no checkpoint before it" in str(e.value)
  assert checkpoint.newest(tmp_path) is None


def test_padding_may_be_anything(tmp_path):
  """Of shards in device memory, and of the last local row in the store."""
  plan = make_plan("mixed")
  run = fresh(plan, seed=3)
  warm, stored = plan.group("g").tier("warm"), run.store.groups["g"]
  assert warm.shard_rows * warm.owners > warm.rows
  arrays = run.state.tables["g"]["warm"]
  rows = arrays.rows.at[-1, -1].set(NAN)
  tiers = run.state.tables["g"] | {"warm": arrays._replace(rows=rows)}
  run = run._replace(state=run.state._replace(tables={"g": tiers}))
  padding = ~stored.holds_row(np.arange(stored.records))
  assert padding.any()
  stored.parts[0].rows[padding] = NAN
  with checkpoint.manager(tmp_path) as to:
    save(to, 5, run)
  restore(tmp_path, "mixed")


@pytest.mark.parametrize("dtype", ["float32", jnp.bfloat16])
@pytest.mark.parametrize("tail", [(), (1,), (16,)])
def test_the_first_row_that_is_not_finite_is_found(dtype, tail):
  rng = np.random.default_rng(0)
  big = np.finfo(np.float32).max if dtype == "float32" else 3.3e38
  x = rng.choice([0.0, -0.0, 1e-45, big, -big, 1.5], (150_000 // 16, *tail))
  x = x.astype(dtype)
  at = np.arange(len(x)) * 3 + 5
  assert row_checks.first_not_finite(x, at) == row_checks.NONE
  for value in (INF, -INF, NAN, -NAN):
    for first in (0, 4_100, len(x) - 1):
      y = x.copy()
      y[first:][:3] = value
      assert row_checks.first_not_finite(y, at) == at[first]
