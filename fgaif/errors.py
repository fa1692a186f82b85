"""The errors users meet. Each message names the key, file or row, the value, and what to do."""


class FgaifError(Exception):
    """Base of every error that fgaif raises on purpose."""


class ConfigError(FgaifError, ValueError):
    """A configuration key is unknown, out of range or contradicts another."""


class DataError(FgaifError, ValueError):
    """A data file, row, column or image cannot be used."""


class CheckpointError(FgaifError, ValueError):
    """A checkpoint is of the wrong architecture, incomplete or does not match its parts."""


class SyncError(FgaifError, RuntimeError):
    """Learner and rollout engine disagree after a weight sync."""


class DivergedError(FgaifError, RuntimeError):
    """A loss is not finite any more: going on from the last checkpoint would end the same."""


class ActorError(FgaifError, RuntimeError):
    """A role died or did not answer; the message gives the first cause."""


class ServiceError(FgaifError, RuntimeError):
    """A model's API cannot be used: key, quota, budget, address; replies so far are kept."""
