"""The errors vltok raises on top of ValueError and TypeError."""


class VltokError(Exception):
    """Base of vltok's own errors."""


class UnsupportedModelError(VltokError, TypeError):
    """The model, or a part of it that the method needs, is not one vltok knows.

    The message names what is missing and which families have it.
    """


class UnsupportedInputError(VltokError, ValueError):
    """A call the attached method can't answer rightly, such as a prompt on top of a filled cache."""


class EditConflictError(VltokError, RuntimeError):
    """Changes to a model that overlap and would be undone out of order."""


class CheckpointError(VltokError, ValueError):
    """A saved folder that doesn't fit: unknown method, unknown field, wrong model or wrong tensors."""
