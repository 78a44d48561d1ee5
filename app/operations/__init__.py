"""The stories: what happens to a request, in the order in which it happens, for HTTP and command line alike."""

from app.operations.interpolating import Interpolated, interpolate
from app.operations.inverting import Inverted, invert
from app.operations.sampling import Sampled, sample
from app.operations.walks import Caller

__all__ = ["Caller", "Interpolated", "Inverted", "Sampled", "interpolate", "invert", "sample"]
