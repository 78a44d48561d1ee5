"""The stories: what happens to a request, in the order in which it happens, for HTTP and command line alike."""

from app.operations.interpolate import Interpolated, interpolate
from app.operations.invert import Inverted, invert
from app.operations.resolve import RequestContext
from app.operations.sample import Sampled, sample

__all__ = ["Interpolated", "Inverted", "RequestContext", "Sampled", "interpolate", "invert", "sample"]
