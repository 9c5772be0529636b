"""What a measurement ran on."""

import datetime
import os
import platform
from pathlib import Path
from typing import Any


def cpu() -> str:
  """Returns the processor's name."""
  info = Path("/proc/cpuinfo")
  if info.exists():
    for line in info.read_text().splitlines():
      if line.startswith("model name"):
        return line.split(":")[1].strip()
  return platform.processor() or platform.machine()


def about() -> dict[str, Any]:
  """Returns what to print or to store beside figures."""
  return {
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "cpu": cpu(),
    "cores_of_machine": os.cpu_count(),
    "load": os.getloadavg()[0],
    "python": platform.python_version(),
  }
