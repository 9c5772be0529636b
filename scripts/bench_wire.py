"""Bytes on the wire, counted by the kernel, beside what the plan predicts.

  python scripts/bench_wire.py --processes 4

So many processes with a device each train on this machine's loopback, whose
transmit counter (/proc/net/dev) is read before and after `--steps` steps. That
counter holds all that the processes send, the headers of TCP and IP included;
payload is without them (66 bytes a packet). Let nothing else use the loopback
meanwhile: the idle rate is printed too.

The prediction is the plan's (`Prediction.sent`), and beside it what does not
belong to a row: the dense part's gradients, and the agreement on rounds. It
assumes that an all-reduce or all-gather is a ring: each of n devices sends
2 (n-1)/n or (n-1)/n of the whole, as gloo's default does, and that an
all-to-all sends each peer its part directly. XLA's CPU backend sends bfloat16
as float32 unless it is disguised as integers.
"""

import argparse
import copy
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

from recjax import config as config_lib
from recjax.plan.plan import Plan

_HEADERS = 66  # Ethernet, IPv4, TCP with timestamps
_WARM_UP = 5
CASES = {
  "coalesced, hot all-reduced": {"plan.hot_sync": "all_reduce"},
  "coalesced, hot gathered": {"plan.hot_sync": "all_gather"},
  "coalesced in bfloat16, hot gathered": {
    "plan.hot_sync": "all_gather",
    "embedding.exchange_dtype": "bfloat16",
  },
  "all rows hot, all-reduced": {"plan.hot_rows": 1 << 40},
  "no row hot": {"plan.hot_rows": 0},
  "two nodes, all devices asked": {
    "mesh.node_devices": 2,
    "plan.exchange": "flat",
    "plan.warm_copies": "one",
  },
  "two nodes, in two stages": {
    "mesh.node_devices": 2,
    "plan.exchange": "two_stage",
    "plan.warm_copies": "one",
  },
  "two nodes, copies of warm rows": {
    "mesh.node_devices": 2,
    "plan.exchange": "two_stage",
    "plan.warm_copies": "node",
  },
  "two tables pooled at their owners": {"plan.table_wise": "C3,C12"},
  "one table pooled, in bfloat16": {
    "plan.table_wise": "C3",
    "embedding.exchange_dtype": "bfloat16",
  },
}


def base_config(processes: int) -> config_lib.Config:
  """What all cases share."""
  c = config_lib.Config()
  c.data.format = "synthetic"
  c.data.synthetic.samples = 300_000
  c.data.synthetic.rows = 300_000
  c.data.min_count = 1
  c.data.block_samples = 4_096
  c.model.bottom, c.model.top = (64, 32), (64, 32)
  c.mesh.devices = processes
  # Two tables with long bags, coalesced but in the cases that pool them.
  c.data.synthetic.hotness = (*[1, 1, 20], *[1] * 8, 8, *[1] * 14)
  c.plan.table_wise = "none"
  c.plan.hot_rows, c.plan.warm_rows = 2_000, 40_000
  c.train.batch_size = 8_192 * processes
  return c


def transmitted() -> tuple[int, int]:
  """Returns (bytes, packets) that the loopback has sent."""
  for line in pathlib.Path("/proc/net/dev").read_text().splitlines():
    name, _, counts = line.partition(":")
    if name.strip() == "lo":
      fields = counts.split()
      return int(fields[8]), int(fields[9])
  raise RuntimeError("/proc/net/dev has no loopback")


def predict(plan: Plan, dense_words: int, buckets: int) -> dict[str, float]:
  """Bytes that a device sends in a step, by kind; see the file's docstring.

  Args:
    plan: whose prediction says most of it.
    dense_words: of the dense part's gradients, loss and count of rows.
    buckets: whose rounds are agreed on; 0 where no batch can overflow one.
  """
  n = plan.devices
  sent = {k: v for k, v in plan.prediction.sent if k != "host"}
  sent["dense gradients"] = 2 * 4 * dense_words * (n - 1) / n
  if buckets:  # once by the devices, and once by the proxies
    united = any(t.node_capacity for g in plan.groups for t in g.sharded)
    sent["agreement"] = (1 + united) * 2 * 4 * buckets * (n - 1) / n
  return sent


def counted() -> tuple[int, int]:
  """Reads the counters while all processes rest."""
  from recjax import distributed

  time.sleep(0.5)
  text = distributed.from_first(lambda: "{} {}".format(*transmitted()))
  size, packets = text.split()
  return int(size), int(packets)


def work(index: int, count: int, args) -> None:
  """Runs all cases in one of the processes; process 0 prints."""
  from synthetic_step import tiers_of

  from recjax import jobs

  quiet = lambda _: None
  show = quiet if index else lambda line: print(line, flush=True)
  workdir = pathlib.Path(args.workdir)
  prepared = jobs.prepare(base_config(count), workdir, quiet)
  size, _ = transmitted()
  time.sleep(2)
  idle = (transmitted()[0] - size) / 2
  show(f"{count} processes, {args.steps} steps; idle: {idle:,.0f} bytes/s")
  show("bytes that a device sends in a step:")
  for i, (name, changes) in enumerate(CASES.items()):
    if args.only and i not in args.only:
      continue
    config = copy.deepcopy(base_config(count))
    for path, value in changes.items():
      group, field = path.split(".")
      setattr(getattr(config, group), field, value)
    plan, _ = jobs.plan(config, prepared, workdir, quiet)
    lines = measure(config, prepared, plan, args.steps)
    show("\n".join([f"{name}: {tiers_of(plan)}", *lines]))


def measure(config, prepared, plan: Plan, steps: int) -> list[str]:
  """Trains some steps; returns the lines to print of what was sent."""
  import jax

  from recjax.embedding import exchange
  from recjax.embedding.buckets import buckets_of
  from recjax.training import inputs
  from recjax.training.build import build

  run = build(config, prepared, plan)
  state = run.state
  words = 2 + sum(x.size for x in jax.tree.leaves(state.params))
  local = inputs.local_batch(config)
  lookups = [local * g.lookups for g in run.spec.embedding.groups]
  agreed = not exchange.one_round(plan, lookups)
  data = inputs.batches(run, prepared, "train", local, epochs=None)
  fed = inputs.fed(data, run, _WARM_UP + steps)
  rounds, before = 0, (0, 0)
  for i in range(_WARM_UP + steps):
    if i == _WARM_UP:
      jax.block_until_ready(state)
      before = counted()
    state, out = run.step(state, next(fed))
    rounds = max(rounds, int(out["rounds"]))
  jax.block_until_ready(state)
  size, packets = (
    (b - a) / steps / plan.devices
    for a, b in zip(before, counted(), strict=True)
  )
  payload = size - packets * _HEADERS
  sent = predict(plan, words, agreed * len(buckets_of(plan).capacity))
  total = sum(sent.values())
  return [
    *(f"  {kind:20} {x:14,.0f}" for kind, x in sent.items()),
    f"  {'predicted':20} {total:14,.0f}",
    f"  {'payload':20} {payload:14,.0f}  {payload / total - 1:+.2%}",
    f"  {'on the wire':20} {size:14,.0f}  {size / total - 1:+.2%}"
    f"  in {packets:,.0f} packets; rounds {rounds}",
  ]


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--processes", type=int, default=4)
  parser.add_argument("--steps", type=int, default=50)
  parser.add_argument("--only", type=int, nargs="+", help="numbers of cases")
  parser.add_argument("--workdir", help="of the data; a temporary one if none")
  parser.add_argument("--coordinator", help=argparse.SUPPRESS)
  parser.add_argument("--process_id", type=int, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.coordinator:
    from recjax import distributed
    from recjax import mesh as mesh_lib

    job = (args.coordinator, args.processes, args.process_id)
    with distributed.job(*job) as (index, count):
      mesh_lib.simulate_devices(count, count)
      work(index, count, args)
    return
  with tempfile.TemporaryDirectory() as tmp:
    with socket.create_server(("127.0.0.1", 0)) as free:
      coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, __file__, f"--coordinator={coordinator}"]
    command += [f"--processes={args.processes}", f"--steps={args.steps}"]
    command += [f"--workdir={args.workdir or tmp}"]
    command += ["--only", *map(str, args.only)] if args.only else []
    running = [
      subprocess.Popen(
        [*command, f"--process_id={i}"],
        stdout=subprocess.DEVNULL if i else subprocess.PIPE,
        text=True,
      )
      for i in range(args.processes)
    ]
    for line in running[0].stdout or ():
      if not line.startswith("[Gloo]"):  # which says that it is connected
        print(line, end="", flush=True)
    sys.exit(max(abs(p.wait()) for p in running))


if __name__ == "__main__":
  main()
