"""Saved runs, which several modules restore."""

import helpers_checkpoint as lib
import pytest


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
  """(directory, {step: whole state}) of a run of one group.

  Its name would be cut or changed where a path is taken for a URL.
  """
  directory = tmp_path_factory.mktemp("run") / "#1 %41 {b}'" / "checkpoints"
  return directory, lib.save_while_training(directory, "mixed")


@pytest.fixture(scope="session")
def saved_groups(tmp_path_factory):
  """The same of a run of three groups."""
  directory = tmp_path_factory.mktemp("groups") / "checkpoints"
  return directory, lib.save_while_training(directory, "groups")
