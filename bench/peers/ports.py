"""The one option that every peer takes."""

from __future__ import annotations

import argparse


def asked() -> int:
    """``--port``; other options are left to whoever knows them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    return int(parser.parse_known_args()[0].port)
