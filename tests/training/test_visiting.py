"""Stored rows that visit the step: always as if they lived on the device."""

import itertools
import random
import threading
import time

import dense_reference as dense
import helpers
import jax
import numpy as np
import pytest
from helpers_cases import ROWS, case_of, plan_of

from recjax.embedding import visits
from recjax.embedding.coalesce import NONE
from recjax.mesh import batch_sharding
from recjax.plan.plan import Plan
from recjax.training import look_ahead

OPTIMIZERS = tuple(dense.OPTIMIZERS)


def slow(*values):
  return pytest.param(*values, marks=pytest.mark.slow)


def at_random(seed):
  """A delay of each job of the store's queue, up to 10 ms."""
  rng = random.Random(seed)
  return lambda: time.sleep(rng.random() / 100)


# ---- Equality

# Devices, repeats, visitors' room (0: enough), optimizer, who finds out.
CASES = [
  (1, "all", 0, "adam", "host"),
  (8, "some", 1, "rowwise_adagrad", "devices"),
  (2, "none", 0, "adagrad", "devices"),
  *(
    slow(*case)
    for case in (
      (8, "all", 1, "adam", "devices"),
      (8, "none", 1, "sgd", "host"),
      (2, "all", 0, "rowwise_adagrad", "host"),
      (2, "some", 0, "adam", "devices"),
      (1, "none", 1, "rowwise_adagrad", "devices"),
      (1, "some", 1, "adagrad", "host"),
      (8, "all", 0, "sgd", "devices"),
      (8, "some", 0, "adagrad", "host"),
    )
  ),
]


@pytest.mark.parametrize(
  ("devices", "repeats", "room", "optimizer", "by"), CASES
)
@pytest.mark.parametrize("tiers", ["mixed", "frozen"])
def test_equals_dense_tables(
  devices, repeats, room, optimizer, by, tiers, tmp_path
):
  """With write-back delayed at random, and one row's room for visitors."""
  case = case_of("multi_hot_mean", optimizer)._replace(repeats=repeats)
  kw = {"frozen": 90} if tiers == "frozen" else {}
  plan = plan_of(case, devices, "mixed", room, **kw)
  names = [t.name for t in plan.groups[0].tiers]
  assert ("frozen" in names) == (tiers == "frozen")
  dense.check(
    case,
    plan,
    on_host=by == "host",
    delay=at_random(devices + room),
    directory=str(tmp_path),
  )


@pytest.mark.parametrize("on_host", [True, False])
def test_bfloat16_rows_are_rounded_as_on_the_device(on_host):
  """By their ranks, which visitors take along."""
  case, ends = case_of("one_hot", "adagrad", "bfloat16"), []
  for tiers in ("warm", "cold"):
    plan = plan_of(case, 8, tiers)
    _, run, _ = dense.train(case, plan, on_host=on_host)
    ends.append(dense.by_rank(case, run)["g"])
  jax.tree.map(np.testing.assert_array_equal, *ends)


# ---- Order: fast where one ahead, right whatever the order


def placed(run, case):
  return [run.place(batch) for batch in dense.batches(case)]


def trained(run, case, batches):
  state = run.state
  for batch in batches:
    state, _ = run.step(state, batch)
  return dense.by_rank(case, run._replace(state=state))


@pytest.fixture(scope="module")
def wanted():
  case = case_of("one_hot", "adam")
  return case, dense.wanted(case)[1][0]["g"]


def run_of(case, devices=2, **kw):
  return dense.build(case, plan_of(case, devices, "mixed"), **kw)


def test_batches_that_were_placed_long_before(wanted):
  case, want = wanted
  run = run_of(case)
  got = trained(run, case, placed(run, case))
  helpers.assert_close(tuple(got["g"]), want)


def test_batches_that_were_never_placed(wanted):
  case, want = wanted
  run = run_of(case)
  there = batch_sharding(run.mesh)
  batches = (jax.device_put(b, there) for b in dense.batches(case))
  helpers.assert_close(tuple(trained(run, case, batches)["g"]), want)


@pytest.mark.parametrize("on_host", [True, False])
def test_batches_in_another_order_than_they_were_placed(wanted, on_host):
  """What seems to come before a batch does not: it is matched anew."""
  case, want = wanted
  run = run_of(case, on_host=on_host, delay=at_random(5))
  batches = list(dense.batches(case))

  def fed():
    second = run.place(batches[1])
    yield run.place(batches[0])
    yield second
    ahead = run.place(batches[2])
    for following in batches[3:]:
      run.place(batches[7])  # looked at, and never trained
      now, ahead = ahead, run.place(following)
      yield now
    yield ahead

  helpers.assert_close(tuple(trained(run, case, fed())["g"]), want)


def test_the_forward_pass_sees_all_that_was_trained(wanted):
  """Between steps, and with batches that were placed before them."""
  case, _ = wanted
  logits = []
  for tiers in ("warm", "mixed"):
    run = dense.build(case, plan_of(case, 2, tiers), delay=at_random(3))
    state, found = run.state, []
    scored = next(dense.batches(case, seed=9))
    scored["mask"] = np.ones(dense.BATCH, np.float32)
    before = run.place(scored)
    for batch in itertools.islice(dense.batches(case), 5):
      batch = run.place(batch)
      found.append(run.forward(state, before)[0])
      state, _ = run.step(state, batch)
      found.append(run.forward(state, run.place(scored))[0])
    logits.append(np.array(found))
  np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5)
  assert np.ptp(logits[0], axis=0).max() > 0.01


def test_rows_replaced_between_steps_are_the_rows(wanted):
  """As a checkpoint does that is restored onto a run which has trained."""
  case, want = wanted
  run = run_of(case)
  first = run.store.groups["g"].block(0, run.store.groups["g"].records)
  first = jax.tree.map(np.copy, first)
  fresh = jax.tree.map(np.asarray, jax.device_get(run.state))
  shardings = jax.tree.map(lambda x: x.sharding, run.state)
  state = run.state
  for batch in itertools.islice(dense.batches(case, seed=4), 3):
    state, _ = run.step(state, run.place(batch))
  run.store.flush()
  early = run.place(next(dense.batches(case)))
  run.store.flush()
  stored = run.store.groups["g"]
  stored.write(np.arange(stored.records), first)
  run.store.version += 1
  run = run._replace(state=jax.device_put(fresh, shardings))
  rest = itertools.islice(dense.batches(case), 1, None)
  batches = itertools.chain([early], map(run.place, rest))
  helpers.assert_close(tuple(trained(run, case, batches)["g"]), want)


def test_the_host_works_while_the_step_runs(wanted):
  """The fetch for the next batch does not wait for the step before it."""
  case, _ = wanted
  started, go_on = threading.Semaphore(0), threading.Semaphore(0)

  def delay():
    started.release()
    go_on.acquire()

  run = run_of(case, delay=delay)
  a, b, c = itertools.islice(dense.batches(case), 3)
  go_on.release()  # the first fetch
  state, first = run.state, run.place(a)
  second = run.place(b)
  state, _ = run.step(state, first)  # only gives the visitors to the queue
  third = run.place(c)
  for _ in range(10):
    go_on.release()
  state, _ = run.step(state, second)
  run.step(state, third)
  run.store.flush()
  assert sum(iter(lambda: started.acquire(blocking=False), False)) == 6


def test_rooms_double_until_all_visitors_fit_and_stay(wanted):
  """A step is compiled for each: few sizes, which come back."""
  case, _ = wanted
  run = dense.build(case, plan_of(case, 2, "mixed", 1))
  embedding = run.spec.embedding
  ahead = look_ahead.LookAhead(embedding, run.mesh, run.store, on_host=True)
  group = embedding.plan.groups[0]
  planned, most = group.visitors.shard_rows, group.stored[0].shard_rows

  def room(rows):  # of an owner, in a batch
    ids = np.full((dense.BATCH, embedding.columns), -1, np.int32)
    ids.flat[:rows] = group.visitors.first + 2 * np.arange(rows)
    return ahead.visit(ahead.see(ids)).room["g"][0]

  double = [planned << i for i in range(10)]
  before = planned
  for rows in (1, planned + 1, 2 * planned + 1, 1, 4 * planned + 1, 3):
    fits = next(x for x in double if x >= rows)
    before = max(before, min(fits, most))
    assert room(rows) == before
  assert before == 8 * planned < most
  run.store.close()


# ---- Which rows visit


def asked_on_devices(embedding, mesh, room, ids):
  ids = jax.device_put(ids, batch_sharding(mesh))
  return jax.device_get(visits.make_on_devices(embedding, mesh, room)(ids))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["one_hot", "multi_hot_mean"])
def test_numpy_and_the_devices_find_the_same(seed, kind):
  rng = np.random.default_rng(seed)
  devices = int(rng.choice([1, 2, 8]))
  case = case_of(kind)
  plan = plan_of(case, devices, "mixed")
  run = dense.build(case, plan)
  embedding, mesh = run.spec.embedding, run.mesh
  ids = rng.integers(-1, ROWS, (dense.BATCH, embedding.columns))
  ids = ids.astype(np.int32)
  want_ids, lists = visits.on_host(ids, embedding)
  need = max(map(len, lists["g"]))
  got = asked_on_devices(embedding, mesh, {"g": (need, need)}, ids)
  np.testing.assert_array_equal(got.ids, want_ids)
  assert got.need["g"][0] == need
  assert got.need["g"][1] <= need
  for o, want in enumerate(lists["g"]):
    rows = got.rows["g"][:, o]
    np.testing.assert_array_equal(rows[rows != NONE], want)
    assert (rows[len(want) :] == NONE).all()
  first, n = plan.groups[0].visitors.first, devices
  there = ids >= first
  at = want_ids[there] - first
  found = [
    lists["g"][o][i] * n + o for i, o in zip(at // n, at % n, strict=True)
  ]
  np.testing.assert_array_equal(found, ids[there] - first)
  np.testing.assert_array_equal(want_ids[~there], ids[~there])
  if need > 1:  # too little room is noticed, whoever lacks it
    tight = asked_on_devices(embedding, mesh, {"g": (need, 1)}, ids)
    assert tight.need["g"][1] == got.need["g"][1]


def test_the_docstring_s_example():
  case = case_of("one_hot")
  part = case.parts[0]._replace(rows=110)
  group = helpers.make_group(2, 110, 0, 100, tables=part.tables)
  run = dense.build(
    case._replace(parts=(part,)), Plan(2, dense.BATCH, (group,))
  )
  ids = np.int32([[3, 107, 101], [104, 107, -1]])
  got, lists = visits.on_host(ids, run.spec.embedding)
  assert got.tolist() == [[3, 103, 101], [100, 103, -1]]
  assert [x.tolist() for x in lists["g"]] == [[2], [0, 3]]


def test_where_rows_stood_before():
  before, now = np.int32([1, 4, 7]), np.int32([0, 1, 5, 7, 9])
  got = visits.forwarded(before, now)
  assert got.tolist() == [NONE, 0, NONE, 2, NONE]
  assert visits.forwarded(before[:0], now).tolist() == [NONE] * 5
  assert visits.forwarded(before, now[:0]).tolist() == []
