"""The one error a user is meant to read."""


class CotfaithError(ValueError):
    """Something the user can mend: one sentence with what was found, what was expected, and the remedy."""


class EndpointError(CotfaithError):
    """An endpoint gives no answers at all: a run stops there, as every unit after it would fail too, and resumes."""
