"""How a noise predictor is served: HTTP at the rim, the batching engine inside."""

__version__ = "0.1.0"
