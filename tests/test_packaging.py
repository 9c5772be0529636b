"""What is written twice in the project's files agrees."""

import importlib.metadata
import pathlib
import re
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pinned(path: pathlib.Path) -> dict[str, str]:
  """Name -> version of a constraints file."""
  lines = path.read_text().splitlines()
  pairs = (s.split("==") for s in lines if not s.startswith("#"))
  return {name.lower(): version for name, version in pairs}


CONSTRAINTS = {
  p.stem.removeprefix("python"): pinned(p)
  for p in (ROOT / "constraints").glob("python*.txt")
}


def test_the_wheel_has_every_package():
  folders = {p.parent for p in (ROOT / "recjax").rglob("*.py")}
  packages = {".".join(p.relative_to(ROOT).parts) for p in folders}
  assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages | {
    "recjax.configs"
  }
  assert (ROOT / "recjax" / "py.typed").exists()


@pytest.mark.parametrize("python", CONSTRAINTS)
def test_constraints_pin_every_dependency(python):
  extras = PROJECT["project"]["optional-dependencies"]
  wanted = PROJECT["project"]["dependencies"] + extras["test"]
  names = {re.split(r"[><=\[]", w)[0].lower() for w in wanted}
  assert "recjax[compile]" in extras["test"]
  names |= {"libtpu", "jax-cuda12-plugin", "jax-cuda12-pjrt"}
  assert names - {"recjax"} <= CONSTRAINTS[python].keys()


@pytest.mark.parametrize("python", CONSTRAINTS)
def test_compilers_are_those_of_the_pinned_jax(python):
  pins = CONSTRAINTS[python]
  for name in ("jaxlib", "jax-cuda12-plugin", "jax-cuda12-pjrt"):
    assert pins[name] == pins["jax"]
  if importlib.metadata.version("jax") == pins["jax"]:
    requires = importlib.metadata.requires("jax") or []
    (tpu,) = (r for r in requires if r.startswith("libtpu"))
    version = re.search(r"==([\d.]+)\.\*", tpu)
    assert version is not None
    assert pins["libtpu"].startswith(version[1] + ".")


def test_ci_and_hooks_use_the_pinned_versions():
  workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
  matrix = re.search(r"python: \[(.*)\]", workflow)
  assert matrix is not None
  assert set(re.findall(r'"([^"]+)"', matrix[1])) == CONSTRAINTS.keys()
  hooks = (ROOT / ".pre-commit-config.yaml").read_text()
  rev = re.search(r"rev: v(\S+)", hooks)
  assert rev is not None
  assert {c["ruff"] for c in CONSTRAINTS.values()} == {rev[1]}
