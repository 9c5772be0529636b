"""Where a compiled step's time goes: by named scope, and by kernel.

What bench_embedding.py and bench_dcnv2.py report of a step:

  compiled = step.lower(state, batch).compile()
  state, times = timed(step, state, batches)
  state, found = traced(step, compiled.as_text(), state, batches)

A kernel belongs to the scope of its HLO instruction, which the trace names
(`hlo_op`) or the kernel is named after; fused instructions count for the scope
of the fusion's root. On CPUs instructions are traced instead of kernels, those
that call others (loops) too, on several threads: there `busy_ms` says more
than the sum over scopes.
"""

import collections
import glob
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from recjax.training.compiled import instructions, opcodes, scope_of


class Event(NamedTuple):
  """A kernel, or on CPUs an instruction, that ran on the device."""

  name: str
  hlo_op: str  # "" where the trace doesn't say
  begin: float  # ns
  duration: float  # ns


# ---- Compiled text


def static(compiled: jax.stages.Compiled) -> dict[str, Any]:
  """Returns what needs no run: instructions of the entry, memory."""
  memory = compiled.memory_analysis()
  return {
    "entry": opcodes(compiled.as_text()),
    "temp_mb": memory.temp_size_in_bytes / 1e6,
    "alias_mb": memory.alias_size_in_bytes / 1e6,
    "host_temp_mb": memory.host_temp_size_in_bytes / 1e6,
  }


# ---- Time


def timed(
  step: Callable,
  state: Any,
  batches: Sequence,
  rounds: int = 5,
  steps: int = 8,
) -> tuple[Any, dict[str, Any]]:
  """Times steps, some in a row without waiting, and some alone.

  Args:
    step: (state, batch) -> (state, metrics); the state is donated.
    state: before the first step.
    batches: cycled.
    rounds: of steps in a row.
    steps: of a round, and alone.

  Returns:
    (state, {"ms", "best_ms", "worst_ms": of a step in a row, "latency_ms": of
    one alone, "metrics": of the last step}).
  """
  out: dict = {}

  def run(count: int) -> float:
    nonlocal state, out
    start = time.perf_counter()
    for i in range(count):
      state, out = step(state, batches[i % len(batches)])
    jax.block_until_ready((state, out))
    return (time.perf_counter() - start) / count

  run(3)
  means = [run(steps) for _ in range(rounds)]
  alone = [run(1) for _ in range(steps)]
  return state, {
    "ms": 1e3 * float(np.median(means)),
    "best_ms": 1e3 * min(means),
    "worst_ms": 1e3 * max(means),
    "latency_ms": 1e3 * float(np.median(alone)),
    "metrics": {k: float(v) for k, v in out.items()},
  }


def busy_seconds(call: Callable[[], object], repeats: int) -> float:
  """Returns how long the device works on a call, which blocks; the mean."""
  call()
  events = _record(lambda: [call() for _ in range(repeats)])
  return 1e-9 * _busy(events) / repeats


def traced(
  step: Callable,
  text: str,
  state: Any,
  batches: Sequence,
  steps: int = 3,
  top: int = 60,
) -> tuple[Any, dict[str, Any]]:
  """Traces steps.

  Args:
    step, state, batches: as in `timed`.
    text: of the compiled step.
    steps: that are traced.
    top: kernels that are listed.

  Returns:
    (state, {"scopes_ms": by scope, "kernels": by scope, "kernels_a_step",
    "busy_ms", "span_ms": from the first to the last, "top": the slowest}), of
    a step.
  """
  known = instructions(text)
  plain = {re.sub(r"\W", "_", name): name for name in known}

  def run():
    nonlocal state
    out = None
    for i in range(steps):
      state, out = step(state, batches[i % len(batches)])
    jax.block_until_ready((state, out))

  events = _record(run)
  scopes, kernels = collections.Counter(), collections.Counter()
  by_kernel: dict[tuple[str, str, str], list[float]] = {}
  for e in events:
    op = e.hlo_op
    if op not in known:
      op = plain.get(re.sub(r"\W", "_", e.name), "")
    scope = scope_of(known[op].op_name) if op else _scope_by_name(e.name)
    scopes[scope] += e.duration
    kernels[scope] += 1
    key = (scope, op or e.hlo_op, e.name[:120])
    by_kernel.setdefault(key, []).append(e.duration)
  slowest = sorted(by_kernel.items(), key=lambda x: -sum(x[1]))[:top]
  per_ms = 1e-6 / steps
  ends = [e.begin + e.duration for e in events]
  return state, {
    "scopes_ms": {k: v * per_ms for k, v in scopes.most_common()},
    "kernels": {k: v / steps for k, v in kernels.most_common()},
    "kernels_a_step": len(events) / steps,
    "busy_ms": _busy(events) * per_ms,
    "span_ms": (max(ends) - min(e.begin for e in events)) * per_ms
    if events
    else 0.0,
    "top": [
      {
        "scope": scope,
        "op": op,
        "op_name": known[op].op_name if op in known else "",
        "kernel": name,
        "a_step": len(durations) / steps,
        "ms": sum(durations) * per_ms,
      }
      for (scope, op, name), durations in slowest
    ],
  }


def _scope_by_name(kernel: str) -> str:
  """Names a kernel of a command buffer, where only products are cuBLAS's."""
  return "gemm" if "gemm" in kernel or "nvjet" in kernel else "unknown"


def _record(run: Callable[[], object]) -> list[Event]:
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  options.host_tracer_level = 1
  with tempfile.TemporaryDirectory() as folder:
    jax.profiler.start_trace(folder, profiler_options=options)
    run()
    jax.profiler.stop_trace()
    return list(_events(folder))


def _events(folder: str) -> Iterator[Event]:
  (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
  planes = list(jax.profiler.ProfileData.from_file(path).planes)
  gpus = [p for p in planes if p.name.startswith("/device:GPU")]
  for plane in gpus or planes:
    lines = list(plane.lines)
    streams = [x for x in lines if x.name.startswith("Stream")]
    for line in streams or lines:
      for event in line.events:
        stats = {k: v for k, v in event.stats if k is not None}
        if gpus or "hlo_op" in stats:
          op = str(stats.get("hlo_op", ""))
          yield Event(event.name, op, event.start_ns, event.duration_ns)


def _busy(events: Sequence[Event]) -> float:
  """Returns the length of the union of what ran, in ns."""
  busy, end = 0.0, 0.0
  for a, b in sorted((e.begin, e.begin + e.duration) for e in events):
    busy += max(0.0, b - max(a, end))
    end = max(end, b)
  return busy


# ---- To print


def report(name: str, found: dict[str, Any], samples: int) -> None:
  """Prints what `timed`, `static` and maybe `traced` found of a step."""
  print(
    f"{name}: {found['ms']:.3f} ms a step (best {found['best_ms']:.3f}, alone "
    f"{found['latency_ms']:.3f}), {1e3 * samples / found['ms']:,.0f} samples/s,"
    f" temp {found['temp_mb']:,.0f} MB, compiled in {found['compile_s']:.1f} s"
  )
  metrics = (f"{k} {v:.6g}" for k, v in found["metrics"].items())
  print(f"  metrics {', '.join(metrics)}")
  entry = (f"{k} {v}" for k, v in found["entry"].items())
  print(f"  entry   {', '.join(entry)}")
  if "scopes_ms" in found:
    parts = [
      f"{k} {v:.3f} ms ({found['kernels'][k]:.0f})"
      for k, v in found["scopes_ms"].items()
    ]
    print(
      f"  scopes  {', '.join(parts)}; busy {found['busy_ms']:.3f} of "
      f"{found['span_ms']:.3f} ms, {found['kernels_a_step']:.0f} kernels"
    )
    for k in found["top"][:14]:
      print(
        f"    {k['ms']:8.3f} ms x{k['a_step']:<3.0f} {k['scope']:7} "
        f"{k['op'][:32]:32} {k['kernel'][:44]:44} {k['op_name'][-60:]}"
      )
  print(flush=True)
