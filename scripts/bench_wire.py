"""Bytes on the wire, counted by the kernel, beside what the plan predicts.

  python scripts/bench_wire.py --processes 4

So many processes with a device each train on this machine's loopback, whose
transmit counter (/proc/net/dev) is read before and after `--steps` steps. That
counter holds all that the processes send, the headers of TCP and IP included;
payload is without them (66 bytes a packet). Let nothing else use the loopback
meanwhile: the idle rate is printed too.

The prediction is the plan's (`Plan.sent`), and beside it what does not belong
to a row: the dense part's gradients, and the agreement on rounds. It assumes
that an all-reduce or all-gather is a ring: each of n devices sends 2 (n-1)/n
or (n-1)/n of the whole, as gloo's default does, and that an all-to-all sends
each peer its part directly. XLA's CPU backend sends bfloat16 as float32 unless
it is disguised as integers.
"""

import argparse
import copy
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from recjax import config as config_lib

_HEADERS = 66  # Ethernet, IPv4, TCP with timestamps
_WARM_UP = 5
CASES = {
  "coalesced, hot all-reduced": {"plan.hot_sync": "dense"},
  "coalesced, hot gathered": {"plan.hot_sync": "sparse"},
  "coalesced in bfloat16, hot gathered": {
    "plan.hot_sync": "sparse",
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
  "two tables pooled at their owners": {"plan.pooled": "C3,C12"},
  "one table pooled, in bfloat16": {
    "plan.pooled": "C3",
    "embedding.exchange_dtype": "bfloat16",
  },
}


def base_config(processes: int) -> config_lib.Config:
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
  c.plan.pooled = "none"
  c.plan.hot_rows, c.plan.warm_rows = 2_000, 40_000
  c.train.batch_size = 8_192 * processes
  return c


def transmitted() -> tuple[int, int]:
  """(bytes, packets) that the loopback has sent."""
  for line in pathlib.Path("/proc/net/dev").read_text().splitlines():
    name, _, counts = line.partition(":")
    if name.strip() == "lo":
      fields = counts.split()
      return int(fields[8]), int(fields[9])
  raise RuntimeError("/proc/net/dev has no loopback")


def predict(plan, dense_words: int, rounds_agreed: bool) -> dict[str, float]:
  """Bytes that a device sends in a step, by kind; see the file's docstring.

  Args:
    plan: see Plan.sent.
    dense_words: of the dense part's gradients, loss and count of rows.
    rounds_agreed: whether a batch could overflow a buffer.
  """
  n = plan.devices
  sent = {k: v for k, v in plan.sent if k != "host"}
  sent["dense gradients"] = 2 * 4 * dense_words * (n - 1) / n
  if rounds_agreed:  # once by the devices, and once by the proxies
    stages = 1 + (plan.capacity_far_warm + plan.capacity_far_cold > 0)
    buckets = plan.warm_owners + n + 1
    sent["agreement"] = stages * 2 * 4 * buckets * (n - 1) / n
  return sent


def work(index: int, count: int, args) -> None:
  """One process; process 0 prints."""
  import jax

  from recjax import distributed
  from recjax import mesh as mesh_lib
  from recjax.data import batches
  from recjax.embedding import exchange
  from recjax.plan import positions
  from recjax.training import evaluate, train
  from recjax.training import step as step_lib

  quiet = lambda _: None
  show = quiet if index else lambda line: print(line, flush=True)

  def counted() -> tuple[int, int]:
    """The counters while all processes rest."""
    time.sleep(0.5)
    text = distributed.from_first(lambda: "{} {}".format(*transmitted()))
    size, packets = text.split()
    return int(size), int(packets)

  workdir = pathlib.Path(args.workdir)
  prepared = train.prepare(base_config(count), workdir, quiet)
  size, packets = transmitted()
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
    plan = train.plan(config, prepared, workdir, quiet)
    mesh = mesh_lib.make_mesh(count, plan.node_devices)
    model, state = train._build(config, prepared, plan, mesh, args.steps)
    words = 2 + sum(x.size for x in jax.tree.leaves(state.params))
    local = config.train.batch_size // count
    lookups = local * prepared.schema.columns
    agreed = plan.hot < plan.rows or plan.hot_sync == "sparse"
    agreed = agreed and not exchange.one_round(plan, lookups)
    data = batches.dataset(
      prepared,
      "train",
      local,
      epochs=None,
      process_index=index,
      process_count=count,
      positions_of=positions.from_ranks(plan, prepared.profile),
    )
    step = step_lib.make_train_step(model, mesh)
    rounds = 0
    for i in range(_WARM_UP + args.steps):
      if i == _WARM_UP:
        jax.block_until_ready(state)
        before = counted()
      batch = next(data)
      batch.pop("mask")
      state, out = step(state, evaluate.to_devices(batch, mesh))
      rounds = max(rounds, int(out["rounds"]))
    jax.block_until_ready(state)
    after = counted()
    size, packets = (
      (b - a) / args.steps / count for a, b in zip(before, after, strict=True)
    )
    payload = size - packets * _HEADERS
    sent = predict(plan, words, agreed)
    total = sum(sent.values())
    show(f"{name}: {plan.hot:,} hot, {plan.warm:,} warm, {plan.cold:,} cold")
    for kind, x in sent.items():
      show(f"  {kind:16} {x:14,.0f}")
    show(
      f"  {'predicted':16} {total:14,.0f}\n"
      f"  {'payload':16} {payload:14,.0f}  {payload / total - 1:+.2%}\n"
      f"  {'on the wire':16} {size:14,.0f}  {size / total - 1:+.2%}"
      f"  in {packets:,.0f} packets; rounds {rounds}"
    )
    del state


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
