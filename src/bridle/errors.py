"""Every error a user can cause, in one tree. Each message names the value, what was expected, and the remedy.

BridleError
├── ConfigError     a setting is unknown, of the wrong type, or out of range
├── DataError       a data set cannot be read, or nothing usable is left of it
├── HintError       a hint does not fit: size, channels or range
├── BaseError       a base model cannot be found, or is of a family that is not supported
├── FileError       a control file or folder is missing, damaged, or made for something else
├── CacheError      a cache is damaged or incomplete
├── TrainError      a run cannot start or go on
└── SampleError     a request for a picture cannot be met
"""


class BridleError(Exception):
    """Something the user can put right. The command line prints it as one line and exits with 2."""


class ConfigError(BridleError):
    """A setting is unknown, of the wrong type, or out of range."""


class DataError(BridleError):
    """A data set cannot be read, or nothing usable is left of it."""


class HintError(BridleError):
    """A hint does not fit: size, channels or range."""


class BaseError(BridleError):
    """A base model cannot be found, or is of a family that is not supported."""


class FileError(BridleError):
    """A control file or folder is missing, damaged, or made for something else."""


class CacheError(BridleError):
    """A cache is damaged or incomplete."""


class TrainError(BridleError):
    """A run cannot start or go on."""


class SampleError(BridleError):
    """A request for a picture cannot be met."""
