"""Numbers that only grow, each in a row that whoever raises it locks until its commit: they are committed in order."""

import sqlalchemy as sa
from sqlmodel import Session

from service.database.schema import table
from service.jobs.tables import Counter

_counters = table(Counter)


def raise_counter(session: Session, name: str, n: int = 1) -> int:
    """The last of the next `n` numbers of a counter. Others that want one wait for this transaction's commit, so this
    comes after all that may take time."""
    raised = sa.update(_counters).where(_counters.c.name == name).values(value=_counters.c.value + n)
    last: int = session.scalars(raised.returning(_counters.c.value)).one()
    return last
