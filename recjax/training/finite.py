"""A state that is not finite is not saved; the error names what is not."""

import dataclasses

from recjax.errors import UserError
from recjax.frequency import Profile
from recjax.plan import positions
from recjax.plan.plan import Plan
from recjax.training.row_checks import NotFiniteError


@dataclasses.dataclass(frozen=True)
class Refusal:
  """What the error of a state says beside what is not finite."""

  directory: str  # of the checkpoints
  last: int | None  # the newest one there
  step: int  # after which the state is
  plan: Plan
  profile: Profile | None  # of all rows, to name the table of one

  def of_row(self, e: NotFiniteError) -> UserError:
    """Returns the error of a row."""
    group = self.plan.group(e.group)
    row = positions.name_row(group, e.position, self.profile)
    return self.of(row if e.array == "rows" else f"{e.array} of {row}")

  def of(self, what: str) -> UserError:
    """Returns the error where `what` is not finite."""
    kept = "there is no checkpoint before it"
    if self.last is not None:
      kept = f"checkpoint {self.last} in {self.directory} is kept"
    return UserError(
      f"the state after step {self.step} is not finite ({what}) and is not "
      f"saved; {kept}. Look at the data of the steps before, or go on in "
      f"another --workdir with a lower train.learning_rate or "
      "embedding.learning_rate and this one as train.start_from"
    )
