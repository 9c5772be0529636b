"""The mutants that scripts/mutate.py makes, and whom it asks about them."""

import pathlib

import mutate

ROOT = pathlib.Path(__file__).parents[1]


def test_modules_and_their_tests_are_there():
  for module, files in mutate.TESTS.items():
    assert (ROOT / "recjax" / f"{module}.py").exists()
    for file in files:
      assert (ROOT / "tests" / file.split("::")[0]).exists()


def test_a_mutant_is_one_change():
  source = (
    "def f(a: int = 2) -> int:\n"
    '  """Says nothing of 3."""\n'
    "  if not a < 1:\n"
    '    raise ValueError("above 4")\n'
    "  return g(a)"
  )
  found = mutate.mutants(source)
  assert {(m["line"], m["was"], m["is"]) for m, _ in found} == {
    (1, "2", "3"),
    (1, "2", "1"),
    (3, "not a < 1", "a < 1"),
    (3, "a < 1", "a <= 1"),
    (3, "1", "2"),
    (3, "1", "0"),
    (4, "raise ValueError('above 4')", "pass"),
    (5, "return g(a)", "return a"),
  }
  for _, text in found:
    compile(text, "mutant", "exec")
    assert len(text.splitlines()) == 5
