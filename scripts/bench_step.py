"""Samples/s of a whole training step: recjax and what else there is.

  python scripts/bench_step.py --dim 16 --batch 8192 \
      --rivals_python PYTHON_WITH_TORCH_AND_FBGEMM

Every contender trains the same model (DLRM with criteo_kaggle's MLPs, dense
part by Adagrad) on the same batches, with the 26 Criteo Kaggle tables:

  recjax         row-wise Adagrad
  plain_jax      jnp.take, gradients through the tables, row-wise Adagrad
  torch_sgd      EmbeddingBag(sparse=True) a table, SGD
  torch_adagrad  the same, Adagrad (torch has no row-wise one)
  fbgemm         table-batched embeddings, fused exact row-wise Adagrad

torch's tables are on the CPU, its dense part is on the GPU where it sees one;
with --device_share 0.02, a fiftieth of the rows fit recjax's device memory, and
the planner says which rows those are. recjax's lookups are sorted as data.route
says: on CPUs by a thread during the step before, in the time that is measured.

A sample looks one row of each table up, or with --multi_hot 1 to 100, 214 in
all. Ids are drawn from a power law, the hottest first in every table.
Contenders run one after the other, each in a process of its own on the same
cores and with the same malloc settings, in rounds that start with another one
each time, so that noise hits all alike. Batches are converted to what a
contender wants before the clock starts. Those that are not installed or do not
fit in memory are left out with a note. `cpu ms` is processor time of all
threads, waiting ones that spin included; "at least" is roofline.py's.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
import numpy as np
import roofline
from bench_contenders import CONTENDERS, DENSE

from recjax import malloc

ROOT = Path(__file__).parents[1]
_SETTINGS = "settings.json"  # in the folder that a contender reads


def draw_batches(args):
  """Draws dense [n, B, 13], ids [n, B, S] int32 and labels [n, B]."""
  from recjax.data import power_law

  rng = np.random.default_rng(args.seed)
  shape = (args.batches, args.batch)
  ids = [
    power_law.ranks(rng, (*shape, h), r, args.exponent)
    for r, h in zip(args.rows, args.hotness, strict=True)
  ]
  ids = np.concatenate(ids, axis=-1, dtype=np.int32, casting="unsafe")
  dense = rng.random((*shape, DENSE), np.float32)
  labels = (rng.random(shape) < 0.25).astype(np.float32)
  return dense, ids, labels


def pin(cores: int) -> None:
  """Keeps this process to so many cores, where the system can."""
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


def work(args):
  """Times a contender, in its own process; returns what it prints as JSON."""
  make_step, packages, copies = CONTENDERS[args.worker]
  pin(args.cores)
  if args.malloc == "tuned":
    malloc.keep_freed_memory()
  missing = [p for p in packages if importlib.util.find_spec(p) is None]
  if missing:
    return {"skipped": f"{' and '.join(missing)} not installed"}
  if args.small_dim and args.worker != "recjax":
    return {"skipped": "its tables have one dim"}
  need = copies * sum(args.rows) * args.dim * 4
  have = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  if need > have:
    return {"skipped": f"needs {need / 1e9:.0f} GB, {have / 1e9:.0f} GB free"}
  data = [np.load(Path(args.folder) / f"{i}.npy") for i in range(3)]
  step = make_step(data, args)
  seconds, cpu, losses = [], [], []
  for i in range(args.warmup + args.steps):
    start, used = time.perf_counter(), time.process_time()
    losses.append(step(i % args.batches))
    seconds.append(time.perf_counter() - start)
    cpu.append(time.process_time() - used)
  names = {"fbgemm_gpu": ("fbgemm-gpu-cpu", "fbgemm-gpu")}
  return {
    "seconds": seconds[args.warmup :],
    "cpu": cpu[args.warmup :],
    "loss": losses[-1],
    "versions": {p: version(*names.get(p, (p,))) for p in packages},
  }


def version(*names):
  """Returns the version of the first of these packages that is there."""
  for name in names:
    try:
      return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      pass
  return "?"


def run_worker(name, args, folder):
  """Runs a contender; rivals in their own Python, which has no recjax."""
  rival = "torch" in CONTENDERS[name][1]
  command = [args.rivals_python if rival else sys.executable, __file__]
  command += ["--worker", name, "--folder", folder]
  environment = os.environ | ({"PYTHONPATH": str(ROOT)} if rival else {})
  try:
    out = subprocess.run(
      command, capture_output=True, text=True, env=environment
    )
  except OSError as e:
    return {"skipped": str(e)}
  if out.returncode:
    last = (out.stderr.strip().splitlines() or ["no message"])[-1]
    return {"skipped": f"exit code {out.returncode}: {last}"}
  *notes, result = out.stdout.splitlines()
  return json.loads(result) | {"notes": notes}


def compare(args):
  """Runs all contenders in rounds.

  Returns:
    ({name: its times, versions and notes}, a step's {"flops", "bytes"} at
    least).
  """
  results = {name: {"seconds": [], "cpu": []} for name in args.contenders}
  with tempfile.TemporaryDirectory() as folder:
    drawn = draw_batches(args)
    flops, moved = roofline.floors(args, drawn[1][0])
    for i, array in enumerate(drawn):
      np.save(Path(folder) / f"{i}.npy", array)
    Path(folder, _SETTINGS).write_text(json.dumps(vars(args)))
    for r in range(args.rounds):
      start = r % len(args.contenders)
      for name in args.contenders[start:] + args.contenders[:start]:
        if "skipped" in results[name]:
          continue
        result = run_worker(name, args, folder)
        for key in ("seconds", "cpu"):
          result[key] = [*results[name][key], *result.get(key, [])]
        results[name] = result
  for result in results.values():
    if "skipped" not in result:
      seconds = np.array(result["seconds"])
      result["samples_per_second"] = args.batch / float(np.median(seconds))
      result["best"] = args.batch / float(seconds.min())
      result["cpu_ms"] = 1e3 * float(np.median(result["cpu"]))
  return results, {"flops": flops, "bytes": moved}


def report(settings, results):
  """Prints a table of contenders."""
  fbgemm = results.get("fbgemm", {}).get("samples_per_second")
  print(
    f"\ndim {settings['dim']}, batch {settings['batch']}, power law "
    f"{settings['exponent']}, {settings['lookups']} lookups a sample, "
    f"{settings['cores']} cores, "
    f"{settings['rounds']} x {settings['steps']} steps, "
    f"malloc {settings['malloc']}"
  )
  of, rates = settings["floor"], settings["rates"]
  ms = {k: 1e3 * of[k] / rates[k] for k in of}
  print(
    f"at least {ms['flops']:.1f} ms: {of['flops'] / 1e9:.2f} GFLOP, dense; "
    f"{ms['bytes']:.1f} ms: {of['bytes'] / 1e6:.0f} MB of rows"
  )
  print("contender      samples/s     best  / fbgemm  ms/step   cpu ms  loss")
  for name, r in results.items():
    if "skipped" in r:
      print(f"{name:13} skipped: {r['skipped']}")
      continue
    ratio = f"{r['samples_per_second'] / fbgemm:.2f}" if fbgemm else "-"
    ms = 1e3 * settings["batch"] / r["samples_per_second"]
    versions = " ".join(f"{k} {v}" for k, v in r["versions"].items())
    print(
      f"{name:13} {r['samples_per_second']:10,.0f} {r['best']:8,.0f} "
      f"{ratio:>9} {ms:8.1f} {r['cpu_ms']:8.1f}  {r['loss']:.4f}  {versions}",
      flush=True,
    )
    for note in r["notes"]:
      print(f"  {note}")


def parse():
  """Parses the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--dim", type=int, nargs="+", default=[16, 64])
  add("--batch", type=int, nargs="+", default=[2048, 8192])
  add("--exponent", type=float, default=1.05, help="of the ids' power law")
  add("--multi_hot", action="store_true", help="MLPerf's lookups of a table")
  add(
    "--mixed",
    type=int,
    default=0,
    metavar="DIM",
    help="of recjax's tables below 1,000 rows; 0 = --dim",
  )
  add(
    "--device_share",
    type=float,
    default=2,
    help="rows that recjax's device holds / all",
  )
  add("--route", choices=["auto", "host", "device"], default="auto")
  add("--topology", default="", help="recjax's: a preset or file; else found")
  add("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
  add("--rivals_python", default=sys.executable, help="has torch and fbgemm")
  add("--rounds", type=int, default=3)
  add("--steps", type=int, default=20, help="timed, a round")
  add("--warmup", type=int, default=5, help="steps before, a round")
  add("--batches", type=int, default=16, help="different ones, cycled")
  add("--cores", type=int, default=2)
  add("--malloc", choices=["tuned", "default"], default="tuned")
  add("--seed", type=int, default=0)
  add("--json", help="file to write")
  add("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
  add("--folder", help=argparse.SUPPRESS)
  return parser.parse_args()


def main():
  args = parse()
  if args.worker:
    told = json.loads(Path(args.folder, _SETTINGS).read_text())
    told |= {"worker": args.worker, "folder": args.folder}
    print(json.dumps(work(argparse.Namespace(**told))))
    return
  from criteo_tables import MULTI_HOT

  from recjax.data.criteo import KAGGLE_ROWS

  args.rows, args.small_dim = KAGGLE_ROWS, args.mixed
  args.hotness = MULTI_HOT if args.multi_hot else (1,) * len(args.rows)
  args.lookups = sum(args.hotness)
  about = machine.about()
  print(", ".join(f"{k} {v}" for k, v in about.items()))
  pin(args.cores)
  rates = {
    "flops": roofline.flops_per_second(),
    "bytes": roofline.bytes_per_second(args.cores),
  }
  print(
    f"a product in float32 {rates['flops'] / 1e9:.0f} GFLOP/s, a copy "
    f"{rates['bytes'] / 1e9:.1f} GB/s"
  )
  runs = []
  for dim, batch in itertools.product(args.dim, args.batch):
    one = argparse.Namespace(**{**vars(args), "dim": dim, "batch": batch})
    results, floor = compare(one)
    names = ("dim", "batch", "exponent", "lookups")
    names += ("cores", "rounds", "steps", "malloc")
    names += ("device_share", "topology", "mixed", "route")
    settings = {k: getattr(one, k) for k in names}
    settings |= {"floor": floor, "rates": rates}
    report(settings, results)
    runs.append({**settings, "results": results})
  if args.json:
    text = json.dumps({**about, "runs": runs}, indent=1)
    Path(args.json).write_text(text)


if __name__ == "__main__":
  main()
